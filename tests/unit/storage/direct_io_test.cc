#include "storage/direct_io.h"

#include <fcntl.h>

#include <thread>

#include "base/buffer.h"
#include "storage/file_storage.h"
#include "support/must.h"
#include "support/random.h"
#include "unit/storage/host.h"

namespace imgfuse::test {
namespace {

/// What the file should hold.
class Model {
 public:
  explicit Model(std::vector<std::byte> content) : content_(std::move(content)) {}

  void write(uint64_t offset, ConstBytes data) {
    if (data.empty()) return;
    if (content_.size() < offset + data.size()) content_.resize(offset + data.size());
    std::copy(data.begin(), data.end(), content_.begin() + static_cast<ptrdiff_t>(offset));
  }
  std::vector<std::byte> read(uint64_t offset, size_t length) const {
    std::vector<std::byte> out(length);
    for (size_t i = 0; i < length && offset + i < content_.size(); ++i) out[i] = content_[offset + i];
    return out;
  }
  void resize(uint64_t size) { content_.resize(size); }
  const std::vector<std::byte>& content() const { return content_; }

 private:
  std::vector<std::byte> content_;
};

std::shared_ptr<FileStorage> open_direct(const std::string& path) {
  auto storage = must(FileStorage::open(path, {.writable = true, .cache = CacheMode::none}));
  REQUIRE((fcntl(storage->fd(), F_GETFL) & O_DIRECT) != 0);
  return storage;
}

/// Offsets and lengths of every kind: aligned, off by one, tiny, longer than the bounce buffer.
uint64_t some_position(Rng& rng, uint64_t limit) {
  const uint64_t at = rng.below(limit);
  switch (rng.below(4)) {
    case 0:
      return at / 4096 * 4096;
    case 1:
      return at / 512 * 512;
    default:
      return at;
  }
}

std::vector<ConstBytes> split(Rng& rng, ConstBytes data) {
  std::vector<ConstBytes> parts;
  while (!data.empty()) {
    const size_t n = rng.one_in(2) ? data.size() : rng.between(0, data.size());
    parts.push_back(data.first(n));
    data = data.subspan(n);
  }
  return parts;
}

void run_model_test(const std::string& path, uint64_t seed) {
  CAPTURE(seed);
  Rng rng(seed);
  const uint64_t limit = rng.one_in(2) ? 1_MiB : 20000;
  Model model(pattern(rng.below(limit), seed));
  write_file(path, model.content());
  auto storage = open_direct(path);

  for (int step = 0; step < 150; ++step) {
    CAPTURE(step);
    const uint64_t offset = some_position(rng, limit);
    const uint64_t length = some_position(rng, rng.one_in(4) ? limit : 10000);
    Buffer buffer(length + 4096);
    const Bytes memory = buffer.bytes().subspan(rng.one_in(2) ? 0 : rng.below(4096), length);
    switch (rng.below(8)) {
      case 0: {
        must(storage->write_zeroes({HostOffset(offset), length}));
        model.write(offset, std::vector<std::byte>(length));
        break;
      }
      case 1: {
        must(storage->resize(offset));
        model.resize(offset);
        break;
      }
      case 2:
      case 3: {
        must(storage->read(HostOffset(offset), memory));
        REQUIRE(std::vector(memory.begin(), memory.end()) == model.read(offset, length));
        break;
      }
      default: {
        const auto data = pattern(length, rng.next());
        std::copy(data.begin(), data.end(), memory.begin());
        must(storage->write(HostOffset(offset), std::span<const ConstBytes>(split(rng, memory))));
        model.write(offset, data);
      }
    }
    REQUIRE(must(storage->size()) == model.content().size());
    REQUIRE(std::filesystem::file_size(path) == model.content().size());
  }

  must(storage->flush());
  storage.reset();
  CHECK(read_file(path) == model.content());
}

}  // namespace

TEST_CASE("direct I/O: requests of any alignment do what buffered ones would, and lengths stay exact") {
  const TempDir dir;
  const uint64_t runs = from_environment("IMG_RUNS", 25);
  for (uint64_t run = 0; run < runs; ++run) run_model_test(dir / "image", base_seed() + run);
}

TEST_CASE("direct I/O: an aligned request is one host call, unaligned memory costs no reading") {
  const TempDir dir;
  make_file(dir / "image", 1_MiB);
  auto storage = open_direct(dir / "image");
  Buffer buffer = Buffer::zeroed(128_KiB);

  must(storage->write(HostOffset(4096), buffer.bytes().first(64_KiB)));
  must(storage->read(HostOffset(4096), buffer.bytes().first(64_KiB)));
  CHECK(storage->counts().writes == 1);
  CHECK(storage->counts().reads == 1);

  must(storage->write(HostOffset(4096), buffer.bytes().subspan(1, 64_KiB)));
  CHECK(storage->counts().writes == 2);
  CHECK(storage->counts().reads == 1);
}

TEST_CASE("direct I/O: writers of one block do not undo each other") {
  const TempDir dir;
  const uint64_t size = 3 * 4096 + 100;  // the last block is the end of the file
  make_file(dir / "image", size);
  auto storage = open_direct(dir / "image");
  constexpr uint64_t kThreads = 4;

  // Every thread owns each byte whose number leaves its remainder, and writes the round into all of them.
  std::vector<std::thread> threads;
  std::atomic<int> failures = 0;
  for (uint64_t thread = 0; thread < kThreads; ++thread)
    threads.emplace_back([&, thread] {
      Rng rng(base_seed() + thread);
      for (int step = 0; step < 400; ++step) {
        const uint64_t offset = rng.below(size / kThreads) * kThreads + thread;
        const std::byte value{static_cast<unsigned char>(1 + thread)};
        if (!storage->write(HostOffset(offset), ConstBytes(&value, 1))) ++failures;
        std::byte back{};
        if (!storage->read(HostOffset(offset), Bytes(&back, 1)) || back != value) ++failures;
      }
    });
  for (std::thread& thread : threads) thread.join();

  CHECK(failures == 0);
  CHECK(std::filesystem::file_size(dir / "image") == size);
  const auto content = read_file(dir / "image");
  size_t wrong = 0;
  for (size_t i = 0; i < content.size(); ++i)
    if (content[i] != std::byte{0} && content[i] != std::byte{static_cast<unsigned char>(1 + i % kThreads)}) ++wrong;
  CHECK(wrong == 0);
}

TEST_CASE("direct I/O: the rest of the file stays out of the page cache's way after its end was written") {
  const TempDir dir;
  make_file(dir / "image", 4096 + 10);
  auto storage = open_direct(dir / "image");
  Buffer block = Buffer::zeroed(4096);

  must(storage->write(HostOffset(4096 + 5), pattern(5)));  // through the page cache
  must(storage->resize(8192));
  const auto content = pattern(4096);
  std::copy(content.begin(), content.end(), block.data());
  must(storage->write(HostOffset(4096), block.bytes()));  // past it

  std::vector<std::byte> out(4096);
  must(storage->read(HostOffset(4096), out));
  CHECK(out == content);
  CHECK((fcntl(storage->fd(), F_GETFL) & O_DIRECT) != 0);
}

}  // namespace imgfuse::test
