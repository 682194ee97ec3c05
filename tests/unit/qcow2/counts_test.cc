// What requests cost: host calls, memory from the heap, and locks. A program of its own, as it replaces operator new
// and counts how often mutexes are taken (see `wrapped` in meson.build).
#include <doctest/doctest.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "format/raw/raw.h"
#include "support/builders.h"
#include "support/intercepted_storage.h"

namespace {

std::atomic<uint64_t> allocations = 0;

void* count_and_allocate(size_t size) {
  ++allocations;
  void* memory = std::malloc(size ? size : 1);
  if (!memory) std::abort();
  return memory;
}

}  // namespace

namespace {

std::atomic<uint64_t> mutexes = 0;

}  // namespace

// NOLINTBEGIN
extern "C" {
int __real_pthread_mutex_lock(pthread_mutex_t* mutex);
int __wrap_pthread_mutex_lock(pthread_mutex_t* mutex) {
  ++mutexes;
  return __real_pthread_mutex_lock(mutex);
}
int __real_pthread_mutex_trylock(pthread_mutex_t* mutex);
int __wrap_pthread_mutex_trylock(pthread_mutex_t* mutex) {
  ++mutexes;
  return __real_pthread_mutex_trylock(mutex);
}
}
void* operator new(size_t size) { return count_and_allocate(size); }
void* operator new[](size_t size) { return count_and_allocate(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
// NOLINTEND

namespace imgfuse::test {
namespace {

struct Fixture {
  explicit Fixture(const Qcow2Spec& spec = {}) : memory(std::make_shared<MemStorage>(make_qcow2(spec))) {
    disk = must(open_qcow2(memory));
    must(disk->write(GuestOffset(0), pattern(8_MiB)));
    must(disk->flush());
    std::vector<std::byte> bytes(8_MiB);
    must(disk->read(GuestOffset(0), bytes));  // loads the tables
    memory->counts().reset();
  }
  ~Fixture() { must(disk->close()); }

  std::shared_ptr<MemStorage> memory;
  std::unique_ptr<Disk> disk;
};

TEST_CASE("qcow2: a 4 KiB read of an allocated cluster is one host read and allocates nothing") {
  for (const uint32_t cluster_size : {4096u, 65536u, 2097152u}) {
    CAPTURE(cluster_size);
    Fixture f({.cluster_size = cluster_size});
    std::vector<std::byte> bytes(4096);

    const uint64_t before = allocations;
    mutexes = 0;
    for (uint64_t i = 0; i < 100; ++i) {
      const bool read = f.disk->read(GuestOffset(i * 69632 / 4096 * 4096), bytes).has_value();
      if (!read) FAIL("read");
    }

    CHECK(allocations == before);
    CHECK(mutexes == 0);  // lookups share the metadata, and leases do not need the list of them
    CHECK(f.memory->counts().reads == 100);
    CHECK(f.memory->counts().bytes_read == 100 * 4096);
  }
}

TEST_CASE("qcow2: a 4 KiB write in place is one host write and allocates nothing") {
  Fixture f;
  const std::vector<std::byte> bytes = pattern(4096);

  const uint64_t before = allocations;
  for (uint64_t i = 0; i < 100; ++i) {
    const bool written = f.disk->write(GuestOffset(i * 69632), bytes).has_value();
    if (!written) FAIL("write");
  }

  // The storage of this test copies pages that are shared with nobody: it allocates nothing either.
  CHECK(allocations == before);
  CHECK(f.memory->counts().writes == 100);
  CHECK(f.memory->counts().reads == 0);
}

TEST_CASE("qcow2: a large read of contiguous clusters is one host read per table slice") {
  Fixture f;
  std::vector<std::byte> bytes(8_MiB);

  must(f.disk->read(GuestOffset(0), bytes));

  CHECK(f.memory->counts().reads <= 2);  // a slice of 512 entries maps 32 MiB; counts of the allocator cut runs, too
}

TEST_CASE("qcow2: in the long run a flush costs one host flush, whether something was allocated or not") {
  Fixture f;
  for (uint64_t i = 0; i < 2; ++i) {  // the first that allocate also make clusters ready for those behind them
    must(f.disk->write(GuestOffset(9_MiB + i * 128_KiB), pattern(4096, i)));
    must(f.disk->flush());
  }
  uint64_t most_in_place = 0;
  uint64_t most_allocating = 0;
  for (uint64_t i = 0; i < 50; ++i) {
    f.memory->counts().reset();
    must(f.disk->write(GuestOffset(i * 4096), pattern(4096, i)));
    must(f.disk->flush());
    most_in_place = std::max<uint64_t>(most_in_place, f.memory->counts().flushes);

    f.memory->counts().reset();
    must(f.disk->write(GuestOffset(10_MiB + i * 128_KiB), pattern(4096, i)));
    must(f.disk->flush());
    most_allocating = std::max<uint64_t>(most_allocating, f.memory->counts().flushes);
  }

  CHECK(most_in_place == 1);
  CHECK(most_allocating == 1);
}

TEST_CASE("qcow2: discarding and writing again costs two host flushes per flush, in the long run") {
  Fixture f;
  for (uint64_t i = 0; i < 52; ++i) {
    if (i == 2) f.memory->counts().reset();
    must(f.disk->discard({GuestOffset(i * 128_KiB), 64_KiB}));
    must(f.disk->write(GuestOffset(10_MiB + i * 128_KiB), pattern(65536, i)));
    must(f.disk->flush());
  }

  CHECK(f.memory->counts().flushes <= 100);
}

TEST_CASE("qcow2: small random writes to an overlay with subclusters cost a tenth more than the guest writes") {
  constexpr uint64_t kWrite = 4096, kWrites = 16384;
  const auto overlay = std::make_shared<MemStorage>(
      make_qcow2({.size = 1_GiB, .cluster_size = 131072, .backing = "base", .extended_l2 = true}));
  MemImage content;
  content.write(0, pattern(1_MiB));
  content.resize(1_GiB);
  const auto below = std::make_shared<MemStorage>(content, false);
  qcow2::OpenParameters parameters;
  parameters.open_backing = [&](const std::string&, const std::optional<std::string>&) {
    return raw::open(below, {.read_only = true});
  };
  auto disk = must(qcow2::open(overlay, std::move(parameters)));
  Rng rng(base_seed());
  const std::vector<std::byte> bytes = pattern(kWrite);
  overlay->counts().reset();
  below->counts().reset();

  for (uint64_t i = 1; i <= kWrites; ++i) {
    must(disk->write(GuestOffset(rng.below(1_GiB / kWrite) * kWrite), bytes));
    if (i % 256 == 0) must(disk->flush());
  }

  const uint64_t guest = kWrites * kWrite;
  const uint64_t host = overlay->counts().bytes_written;
  INFO(host << " bytes on the host for " << guest << " of the guest");
  CHECK(host <= guest + guest / 10);
  CHECK(overlay->counts().zeroes == 1);  // the L2 table
  CHECK(below->counts().reads == 0);
  must(disk->close());
  CHECK(check_image(overlay->image()).clean());
}

/// Drops what the guest writes, and counts the bytes of what else there is: metadata.
class DataSink final : public InterceptedStorage {
 public:
  DataSink(std::shared_ptr<Storage> inner, ConstBytes guest) : InterceptedStorage(std::move(inner)), guest_(guest) {}
  using Storage::write;
  Result<> write(HostOffset offset, std::span<const ConstBytes> parts) override {
    const uint64_t length = length_of(parts);
    const std::byte* const begin = parts.front().data();
    if (begin < guest_.data() || begin >= guest_.data() + guest_.size()) {
      metadata += length;
      return inner().write(offset, parts);
    }
    IMG_LET(const uint64_t size, inner().size());
    const uint64_t end = offset.bytes() + length;
    return end > size ? inner().resize(end) : Result<>{};
  }
  std::atomic<uint64_t> metadata = 0;

 private:
  const ConstBytes guest_;
};

TEST_CASE("qcow2: a GiB that is allocated in sequence costs at most half more metadata than its entries and counts") {
  for (const uint64_t flush_every : {16_MiB, 1_GiB}) {
    for (const uint32_t cluster_size : {65536u, 4096u}) {
      const std::vector<std::byte> data = pattern(1_MiB);
      const auto sink = std::make_shared<DataSink>(
          std::make_shared<MemStorage>(make_qcow2({.size = 1_GiB, .cluster_size = cluster_size})), data);
      auto disk = must(open_qcow2(sink, {.metadata_cache = 32_MiB}));

      for (uint64_t at = 0; at < 1_GiB; at += data.size()) {
        must(disk->write(GuestOffset(at), data));
        if ((at + data.size()) % flush_every == 0) must(disk->flush());
      }
      must(disk->close());

      const uint64_t clusters = 1_GiB / cluster_size;
      const uint64_t needed = clusters * 8 + clusters * 2;  // entries, and counts of 16 bits
      CAPTURE(cluster_size);
      CAPTURE(flush_every);
      CHECK(sink->metadata.load() <= needed + needed / 2);
    }
  }
}

TEST_CASE("qcow2: what lies at the bottom of 16 layers is one host read, and no other layer's") {
  constexpr unsigned kLayers = 16;
  std::vector<std::shared_ptr<MemStorage>> layers;
  std::unique_ptr<Disk> disk;
  for (unsigned i = 0; i < kLayers; ++i) {
    std::optional<std::string> backing;
    if (i > 0) backing = "below";
    layers.push_back(std::make_shared<MemStorage>(make_qcow2({.backing = backing})));
    qcow2::OpenParameters parameters;
    parameters.open_backing = [&](const std::string&,
                                  const std::optional<std::string>&) -> Result<std::unique_ptr<Disk>> {
      return std::move(disk);
    };
    disk = must(qcow2::open(layers.back(), std::move(parameters)));
    // Each layer has an entry in each table, so that none is passed over for want of one.
    must(disk->write(GuestOffset(32_MiB + i * 65536), pattern(4096, i)));
    if (i == 0) must(disk->write(GuestOffset(0), pattern(8_MiB)));
    must(disk->flush());
  }
  std::vector<std::byte> bytes(8_MiB);
  must(disk->read(GuestOffset(0), bytes));  // loads the tables
  for (const auto& layer : layers) layer->counts().reset();
  bytes.resize(4096);

  const uint64_t before = allocations;
  mutexes = 0;
  for (uint64_t i = 0; i < 100; ++i) {
    const bool read = disk->read(GuestOffset(i * 69632), bytes).has_value();
    if (!read) FAIL("read");
  }

  CHECK(allocations == before);
  CHECK(mutexes == 0);
  for (unsigned i = 0; i < kLayers; ++i) CHECK(layers[i]->counts().reads == (i == 0 ? 100 : 0));
  must(disk->close());
}

TEST_CASE("qcow2: threads that flush at the same time share host flushes") {
  Fixture f;
  std::atomic<uint64_t> flushes = 0;
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (uint64_t i = 0; i < 50; ++i) {
        (void)f.disk->write(GuestOffset(t * 1_MiB + i * 4096), pattern(4096, i));
        if (f.disk->flush()) ++flushes;
      }
    });
  for (std::thread& thread : threads) thread.join();

  CHECK(flushes == 200);
  CHECK(f.memory->counts().flushes <= 200);
}

}  // namespace
}  // namespace imgfuse::test
