// What requests cost: host calls, and memory from the heap. A program of its own, as it replaces operator new.
#include <doctest/doctest.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "format/raw/raw.h"
#include "support/builders.h"

namespace {

std::atomic<uint64_t> allocations = 0;

void* count_and_allocate(size_t size) {
  ++allocations;
  void* memory = std::malloc(size ? size : 1);
  if (!memory) std::abort();
  return memory;
}

}  // namespace

// NOLINTBEGIN
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
    for (uint64_t i = 0; i < 100; ++i) {
      const bool read = f.disk->read(GuestOffset(i * 69632 / 4096 * 4096), bytes).has_value();
      if (!read) FAIL("read");
    }

    CHECK(allocations == before);
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

TEST_CASE("qcow2: a flush costs one host flush when nothing was allocated, and two when something was") {
  Fixture f;
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
  CHECK(most_allocating == 2);
}

TEST_CASE("qcow2: discarding and writing again costs two host flushes per flush, in the long run") {
  Fixture f;
  f.memory->counts().reset();

  for (uint64_t i = 0; i < 50; ++i) {
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
  CHECK(overlay->counts().zeroes == 0);
  CHECK(below->counts().reads == 0);
  must(disk->close());
  CHECK(check_image(overlay->image()).clean());
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
