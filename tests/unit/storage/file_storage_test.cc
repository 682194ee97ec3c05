#include "storage/file_storage.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <csignal>
#include <numeric>
#include <random>
#include <thread>

#include "support/must.h"
#include "support/noted_fetches.h"
#include "support/random.h"
#include "unit/storage/host.h"

namespace imgfuse::test {
namespace {

const FileOptions kWritable{.writable = true};

std::shared_ptr<FileStorage> open_writable(const std::string& path, CacheMode cache = CacheMode::writeback) {
  return must(FileStorage::open(path, {.writable = true, .cache = cache}));
}

std::vector<std::byte> read_back(Storage& storage, uint64_t offset, size_t length) {
  std::vector<std::byte> out(length, std::byte{0xee});
  must(storage.read(HostOffset(offset), out));
  return out;
}

std::vector<std::byte> zeros(size_t length) { return std::vector<std::byte>(length); }

/// The file systems that differ: the temporary directory's, and tmpfs, which cannot zero a range by fallocate.
std::vector<std::string> file_systems() {
  std::vector<std::string> parents{std::filesystem::temp_directory_path()};
  if (access("/dev/shm", W_OK) == 0) parents.push_back("/dev/shm");
  return parents;
}

bool knows_what_is_in_memory(int fd) {
  std::byte probe{};
  const iovec part = {&probe, 1};
  return preadv2(fd, &part, 1, 0, RWF_NOWAIT) >= 0 || errno != EOPNOTSUPP;
}

/// What this thread has had disks read so far; 0 on a file system that does not count it.
uint64_t fetched_bytes() {
  rusage usage = {};
  REQUIRE(getrusage(RUSAGE_THREAD, &usage) == 0);
  return static_cast<uint64_t>(usage.ru_inblock) * 512;
}

size_t pages_in_memory(int fd, size_t length) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* const memory = mmap(nullptr, length, PROT_READ, MAP_SHARED, fd, 0);
  REQUIRE(memory != MAP_FAILED);
  std::vector<unsigned char> present(length / page);
  REQUIRE(mincore(memory, length, present.data()) == 0);
  munmap(memory, length);
  return static_cast<size_t>(
      std::count_if(present.begin(), present.end(), [](unsigned char one) { return (one & 1) != 0; }));
}

Error open_failure(const std::string& path, const FileOptions& options = {}) {
  auto storage = FileStorage::open(path, options);
  REQUIRE(!storage);
  return storage.error();
}

}  // namespace

TEST_CASE("file storage: only regular files and block devices are opened, and others do not block") {
  const TempDir dir;
  REQUIRE(mkfifo((dir / "fifo").c_str(), 0600) == 0);

  for (const bool writable : {false, true}) {
    const FileOptions options{.writable = writable};
    CHECK(open_failure(dir / "none", options).code() == ErrorCode::not_found);
    CHECK(open_failure(dir / "none", options).text() == "no such file");
    CHECK(open_failure(dir.path(), options).text() == "is a directory, not an image");
    CHECK(open_failure(dir / "fifo", options).text() == "is neither a regular file nor a block device");
    CHECK(open_failure("/dev/null", options).text() == "is neither a regular file nor a block device");
  }
}

TEST_CASE("file storage: a file that may be read only says so when it is to be written") {
  const TempDir dir;
  make_file(dir / "image", 4096);
  REQUIRE(chmod((dir / "image").c_str(), 0444) == 0);
  REQUIRE(chmod(dir.path().c_str(), 0755) == 0);
  const uid_t user = geteuid();
  if (user == 0) REQUIRE(seteuid(65534) == 0);

  auto storage = FileStorage::open(dir / "image", kWritable);
  const bool readable = FileStorage::open(dir / "image", {}).has_value();
  if (user == 0) REQUIRE(seteuid(0) == 0);

  CHECK(readable);
  REQUIRE(!storage);
  CHECK(storage.error().code() == ErrorCode::denied);
  CHECK(storage.error().text() == "permission denied to write; --read-only works");
}

TEST_CASE("file storage: what lies past the end reads as zeros") {
  const TempDir dir;
  const auto content = pattern(1000);
  write_file(dir / "image", content);
  auto storage = must(FileStorage::open(dir / "image", {}));

  auto expected = content;
  expected.resize(3000);
  CHECK(read_back(*storage, 0, 3000) == expected);
  CHECK(read_back(*storage, 1000, 10) == zeros(10));
  CHECK(read_back(*storage, uint64_t{1} << 40, 10) == zeros(10));
  CHECK(must(storage->size()) == 1000);
}

TEST_CASE("file storage: reading one piece inside the file is one host call") {
  const TempDir dir;
  write_file(dir / "image", pattern(1 << 20));
  auto storage = must(FileStorage::open(dir / "image", {}));

  read_back(*storage, 12345, 4096);
  CHECK(storage->counts().reads == 1);
  read_back(*storage, (1 << 20) - 4096, 4096);
  CHECK(storage->counts().reads == 2);
  read_back(*storage, (1 << 20) - 100, 4096);  // across the end
  CHECK(storage->counts().reads == 3);
}

TEST_CASE("file storage: who does not want to wait gets what is in memory, and hears what is not") {
  constexpr size_t kPart = 64_KiB;
  for (const std::string& parent : file_systems()) {
    CAPTURE(parent);
    const TempDir dir(parent);
    const auto content = pattern(4 * kPart, 1);
    write_file(dir / "file", content);
    auto storage = must(FileStorage::open(dir / "file", {}));
    REQUIRE(fsync(storage->fd()) == 0);
    REQUIRE(posix_fadvise(storage->fd(), 0, 0, POSIX_FADV_RANDOM) == 0);  // nothing is read ahead
    REQUIRE(posix_fadvise(storage->fd(), 0, 0, POSIX_FADV_DONTNEED) == 0);
    read_back(*storage, 0, kPart);

    // Not on tmpfs, which is all memory.
    const bool knows = knows_what_is_in_memory(storage->fd()) && pages_in_memory(storage->fd(), 4 * kPart) < 64;
    NotedFetches fetches;
    std::vector<std::byte> out(2 * kPart);
    {
      NoWait hurry(fetches, NoWait::Clock::now());
      CHECK(storage->read(HostOffset(0), Bytes(out).first(kPart)).has_value());
      CHECK(!hurry.missed());
      const Result<> read = storage->read(HostOffset(kPart / 2), out);
      CHECK(hurry.may_have_waited() == !knows);
      CHECK(hurry.missed() == knows);
      if (knows) {
        REQUIRE(!read);
        CHECK(read.error().code() == ErrorCode::would_wait);
        CHECK(fetches.parts == std::vector<NotedFetches::Part>{{storage->fd(), kPart, out.size() - kPart / 2}});
      }
    }
    must(storage->read(HostOffset(kPart / 2), out));  // waits
    CHECK(std::equal(out.begin(), out.end(), content.begin() + kPart / 2));
    NoWait hurry(fetches, NoWait::Clock::now());
    CHECK(storage->read(HostOffset(kPart / 2), out).has_value());
    CHECK(std::equal(out.begin(), out.end(), content.begin() + kPart / 2));
    CHECK(read_back(*storage, 4 * kPart, 2) == zeros(2));  // behind the end
    CHECK(!hurry.missed());
  }
}

TEST_CASE("file storage: of a file that is read all over the place the host reads no more than is wanted") {
  const TempDir dir("/var/tmp");
  constexpr size_t kPage = 4096;
  constexpr size_t kPages = 32_MiB / kPage;
  const auto content = pattern(kPages * kPage, 1);
  write_file(dir / "file", content);
  auto storage = must(FileStorage::open(dir / "file", {}));
  REQUIRE(fsync(storage->fd()) == 0);
  REQUIRE(posix_fadvise(storage->fd(), 0, 0, POSIX_FADV_DONTNEED) == 0);

  std::vector<uint64_t> order(kPages);
  std::iota(order.begin(), order.end(), uint64_t{0});
  std::shuffle(order.begin(), order.end(), std::mt19937_64(1));
  order.resize(kPages / 2);
  const uint64_t before = fetched_bytes();
  for (const uint64_t page : order) {
    const auto read = read_back(*storage, page * kPage, kPage);
    REQUIRE(std::equal(read.begin(), read.end(), content.begin() + static_cast<ptrdiff_t>(page * kPage)));
  }

  if (knows_what_is_in_memory(storage->fd())) CHECK(fetched_bytes() - before < order.size() * kPage * 5 / 4);
}

TEST_CASE("file storage: who does not want to wait hears that O_DIRECT has to") {
  const TempDir dir("/var/tmp");
  make_file(dir / "file", 64_KiB);
  auto storage = must(FileStorage::open(dir / "file", {.cache = CacheMode::none}));
  NotedFetches fetches;
  NoWait hurry(fetches, NoWait::Clock::now());
  std::vector<std::byte> out(4096);
  CHECK(storage->read(HostOffset(0), out).error().code() == ErrorCode::would_wait);
  CHECK(hurry.missed());
  CHECK(fetches.parts.empty());
  CHECK(storage->counts().reads == 0);
}

TEST_CASE("file storage: the parts of a write go out together, however many there are") {
  const TempDir dir;
  make_file(dir / "image", 0);
  auto storage = open_writable(dir / "image");
  const auto content = pattern(IOV_MAX * 3 + 5);
  std::vector<ConstBytes> parts;
  for (const std::byte& byte : content) parts.push_back({&byte, 1});

  must(storage->write(HostOffset(100), std::span<const ConstBytes>(parts).first(1000)));
  CHECK(storage->counts().writes == 1);
  must(storage->write(HostOffset(100), std::span<const ConstBytes>(parts)));
  CHECK(storage->counts().writes == 5);

  CHECK(read_back(*storage, 100, content.size()) == content);
  CHECK(must(storage->size()) == 100 + content.size());
  CHECK(read_file(dir / "image").size() == 100 + content.size());
}

TEST_CASE("file storage: empty parts are nothing") {
  const TempDir dir;
  make_file(dir / "image", 0);
  auto storage = open_writable(dir / "image");
  const auto content = pattern(10);

  must(storage->write(HostOffset(0), std::array{ConstBytes(), ConstBytes(content), ConstBytes()}));
  must(storage->write(HostOffset(0), ConstBytes()));

  CHECK(read_file(dir / "image") == content);
}

TEST_CASE("file storage: zeroing gives zeros, keeps neighbours and grows the file") {
  for (const std::string& parent : file_systems()) {
    for (const uint64_t length : {uint64_t{1}, 5000_KiB - 1, 70_KiB, 4096_KiB}) {
      CAPTURE(parent);
      CAPTURE(length);
      const TempDir dir(parent);
      const auto content = pattern(1 << 20);
      write_file(dir / "image", content);
      auto storage = open_writable(dir / "image");

      must(storage->write_zeroes({HostOffset(777), length}));

      auto expected = content;
      expected.resize(std::max<size_t>(content.size(), 777 + length));
      std::fill_n(expected.begin() + 777, length, std::byte{0});
      CHECK(read_file(dir / "image") == expected);
      CHECK(must(storage->size()) == expected.size());
    }
  }
}

TEST_CASE("file storage: a discard gives host space back and never grows the file") {
  for (const std::string& parent : file_systems()) {
    CAPTURE(parent);
    const TempDir dir(parent);
    write_file(dir / "image", pattern(4 << 20));
    auto storage = open_writable(dir / "image");
    const uint64_t before = must(storage->allocated());

    must(storage->discard({HostOffset(1_MiB), 2_MiB}));
    must(storage->discard({HostOffset(4_MiB - 1), 5_MiB}));
    must(storage->discard({HostOffset(9_MiB), 1_MiB}));

    CHECK(must(storage->allocated()) <= before - 2_MiB);
    CHECK(must(storage->size()) == 4_MiB);
    CHECK(read_file(dir / "image").size() == 4_MiB);
    CHECK(read_back(*storage, 1_MiB, 2_MiB) == zeros(2_MiB));
  }
}

TEST_CASE("file storage: allocation takes host space, keeps content and grows the file") {
  for (const std::string& parent : file_systems()) {
    CAPTURE(parent);
    const TempDir dir(parent);
    make_file(dir / "image", 1_MiB);
    auto storage = open_writable(dir / "image");
    const auto content = pattern(5000);
    must(storage->write(HostOffset(300_KiB), content));

    must(storage->allocate({HostOffset(0), 2_MiB}));

    CHECK(must(storage->size()) == 2_MiB);
    CHECK(must(storage->allocated()) >= 2_MiB);
    CHECK(read_back(*storage, 300_KiB, 5000) == content);
    CHECK(read_back(*storage, 0, 300_KiB) == zeros(300_KiB));
  }
}

TEST_CASE("file storage: extents tell data from holes, and the end is a hole") {
  for (const std::string& parent : file_systems()) {
    CAPTURE(parent);
    const TempDir dir(parent);
    make_file(dir / "image", 4_MiB);
    auto storage = open_writable(dir / "image");
    must(storage->write(HostOffset(1_MiB), pattern(1 << 20)));

    const StorageExtent hole = must(storage->extent({HostOffset(0), 8_MiB}));
    CHECK(!hole.data);
    CHECK(hole.length == 1_MiB);
    const StorageExtent data = must(storage->extent({HostOffset(1_MiB + 10), 8_MiB}));
    CHECK(data.data);
    CHECK(data.length == 1_MiB - 10);
    CHECK(must(storage->extent({HostOffset(1_MiB), 100})).length == 100);
    const StorageExtent rest = must(storage->extent({HostOffset(2_MiB), 8_MiB}));
    CHECK(!rest.data);
    CHECK(rest.length == 8_MiB);
    CHECK(!must(storage->extent({HostOffset(5_MiB), 1})).data);
  }
}

TEST_CASE("file storage: a flush reaches the host only if something was written since the last") {
  const TempDir dir;
  make_file(dir / "image", 1_MiB);
  auto storage = open_writable(dir / "image");

  must(storage->flush());
  CHECK(storage->counts().flushes == 1);  // what is read may not be durable yet
  must(storage->flush());
  CHECK(storage->counts().flushes == 1);

  must(storage->write(HostOffset(0), pattern(10)));
  must(storage->flush());
  must(storage->flush());
  CHECK(storage->counts().flushes == 2);
  must(storage->write_zeroes({HostOffset(0), 1_MiB}));
  must(storage->flush());
  must(storage->flush());
  CHECK(storage->counts().flushes == 3);
  must(storage->discard({HostOffset(0), 1_MiB}));
  must(storage->flush());
  must(storage->resize(2_MiB));
  must(storage->flush());
  must(storage->allocate({HostOffset(0), 2_MiB}));
  must(storage->flush());
  CHECK(storage->counts().flushes == 6);
}

TEST_CASE("file storage: with cache=unsafe nothing is flushed, and sizes are right") {
  const TempDir dir;
  make_file(dir / "image", 0);
  auto storage = open_writable(dir / "image", CacheMode::unsafe);

  must(storage->write(HostOffset(100), pattern(10)));
  must(storage->flush());

  CHECK(storage->counts().flushes == 0);
  CHECK(must(storage->size()) == 110);
}

TEST_CASE("file storage: a file that may not grow further is out of space") {
  const TempDir dir;
  make_file(dir / "image", 0);
  auto storage = open_writable(dir / "image");
  struct rlimit old {};
  REQUIRE(getrlimit(RLIMIT_FSIZE, &old) == 0);
  const auto old_handler = signal(SIGXFSZ, SIG_IGN);
  const struct rlimit small { 1_MiB, old.rlim_max };
  REQUIRE(setrlimit(RLIMIT_FSIZE, &small) == 0);

  const auto across = storage->write(HostOffset(1_MiB - 100), pattern(200));
  const auto past = storage->write(HostOffset(2_MiB), pattern(1));
  const auto allocation = storage->allocate({HostOffset(0), 2_MiB});
  const auto inside = storage->write(HostOffset(0), pattern(100));

  REQUIRE(setrlimit(RLIMIT_FSIZE, &old) == 0);
  signal(SIGXFSZ, old_handler);
  REQUIRE(!across);
  CHECK(across.error().code() == ErrorCode::no_space);
  CHECK(across.error().text().find("write 0x100000+0x64 of") == 0);  // what was left of it
  REQUIRE(!past);
  CHECK(past.error().code() == ErrorCode::no_space);
  REQUIRE(!allocation);
  CHECK(allocation.error().code() == ErrorCode::no_space);
  CHECK(inside);
}

TEST_CASE("file storage: a resize is exact and a cut off end reads as zeros when it comes back") {
  const TempDir dir;
  write_file(dir / "image", pattern(10000));
  auto storage = open_writable(dir / "image");

  must(storage->resize(5001));
  CHECK(must(storage->size()) == 5001);
  must(storage->resize(10000));

  CHECK(read_back(*storage, 5001, 4999) == zeros(4999));
}

TEST_CASE("file storage: a block device has its own size and cannot grow") {
  const TempDir dir;
  make_file(dir / "disk", 4_MiB);
  const Outcome setup = run({"losetup", "--find", "--show", dir / "disk"});
  if (setup.status != 0) {
    MESSAGE("no loop devices here");
    return;
  }
  const std::string device = setup.output.substr(0, setup.output.find('\n'));
  for (const CacheMode cache : {CacheMode::writeback, CacheMode::none}) {
    auto storage = open_writable(device, cache);
    const auto content = pattern(100_KiB);

    CHECK(must(storage->size()) == 4_MiB);
    CHECK(!storage->info().extensible);
    must(storage->write(HostOffset(777), content));
    CHECK(read_back(*storage, 777, content.size()) == content);
    must(storage->write_zeroes({HostOffset(1000), 90_KiB}));
    CHECK(read_back(*storage, 1000, 90_KiB) == zeros(90_KiB));
    CHECK(read_back(*storage, 777, 223) == std::vector(content.begin(), content.begin() + 223));
    must(storage->discard({HostOffset(100), 1_MiB}));
    must(storage->allocate({HostOffset(0), 4_MiB}));
    const auto past = storage->write(HostOffset(4_MiB), content);
    REQUIRE(!past);
    CHECK(past.error().code() == ErrorCode::no_space);
    CHECK(!storage->resize(8_MiB));
    must(storage->flush());
  }
  CHECK(run({"losetup", "--detach", device}).status == 0);
}

TEST_CASE("file storage: once a flush has failed, all later ones fail") {
  const TempDir dir;
  const std::string full = dir / "full";
  std::filesystem::create_directory(full);
  if (run({"mount", "-t", "tmpfs", "-o", "size=1M", "none", full}).status != 0) {
    MESSAGE("mounting is not allowed here");
    return;
  }
  make_file(full + "/disk", 8_MiB);
  const Outcome setup = run({"losetup", "--find", "--show", full + "/disk"});
  if (setup.status == 0) {
    const std::string device = setup.output.substr(0, setup.output.find('\n'));
    auto storage = open_writable(device);
    must(storage->write(HostOffset(0), pattern(4 << 20)));  // into the page cache; the host has no room for it

    const auto first = storage->flush();
    const auto second = storage->flush();

    REQUIRE(!first);
    CHECK(first.error().code() == ErrorCode::io);
    REQUIRE(!second);
    CHECK(second.error().text() == first.error().text());
    CHECK(storage->counts().flushes == 1);
    storage.reset();
    CHECK(run({"losetup", "--detach", device}).status == 0);
  } else {
    MESSAGE("no loop devices here");
  }
  CHECK(run({"umount", "--lazy", full}).status == 0);
}

TEST_CASE("file storage: flushes of many threads are shared") {
  const TempDir dir;
  make_file(dir / "image", 1_MiB);
  auto storage = open_writable(dir / "image");
  constexpr int kThreads = 8;
  constexpr int kRounds = 20;

  std::vector<std::thread> threads;
  std::atomic<int> failures = 0;
  for (int i = 0; i < kThreads; ++i)
    threads.emplace_back([&, i] {
      for (int round = 0; round < kRounds; ++round) {
        if (!storage->write(HostOffset(static_cast<uint64_t>(i) * 4096), pattern(4096))) ++failures;
        if (!storage->flush()) ++failures;
      }
    });
  for (std::thread& thread : threads) thread.join();

  CHECK(failures == 0);
  CHECK(storage->counts().flushes <= kThreads * kRounds);
  const uint64_t before = storage->counts().flushes;
  must(storage->flush());
  CHECK(storage->counts().flushes == before);  // everything had been covered
}

}  // namespace imgfuse::test
