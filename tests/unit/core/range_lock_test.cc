#include "core/range_lock.h"

#include <doctest/doctest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "support/gate_storage.h"

using namespace imgfuse;
using namespace imgfuse::test;

namespace {

using Lease = RangeLock::Lease;

constexpr GuestRange range(uint64_t begin, uint64_t length) { return {GuestOffset(begin), length}; }

std::unique_ptr<Lease> shared(RangeLock& lock, GuestRange bytes) {
  return std::unique_ptr<Lease>(new Lease(lock.shared(bytes)));
}
std::unique_ptr<Lease> exclusive(RangeLock& lock, GuestRange bytes) {
  return std::unique_ptr<Lease>(new Lease(lock.exclusive(bytes)));
}

}  // namespace

TEST_CASE("RangeLock: readers of the same bytes share them") {
  RangeLock lock;
  const auto first = shared(lock, range(0, 100));

  in_background([&] { return shared(lock, range(50, 100)); }).get();
}

TEST_CASE("RangeLock: whoever changes a mapping has its range alone, and nothing but its range") {
  RangeLock lock;
  auto changing = exclusive(lock, range(100, 100));

  in_background([&] { return exclusive(lock, range(0, 100)); }).get();
  in_background([&] { return shared(lock, range(200, 100)); }).get();
  auto reader = in_background([&] { return shared(lock, range(199, 1)); });
  auto writer = in_background([&] { return exclusive(lock, range(50, 51)); });
  CHECK(waits(reader));
  CHECK(waits(writer));

  changing.reset();
  reader.get();
  writer.get();
}

TEST_CASE("RangeLock: readers that come later do not overtake a waiting writer") {
  RangeLock lock;
  auto reading = shared(lock, range(0, 100));
  auto writer = in_background([&] { return exclusive(lock, range(50, 100)); });
  CHECK(waits(writer));

  auto late_reader = in_background([&] { shared(lock, range(120, 10)); });
  CHECK(waits(late_reader));

  reading.reset();
  auto writing = writer.get();
  CHECK(waits(late_reader));
  writing.reset();
  late_reader.get();
}

TEST_CASE("RangeLock: many threads never meet inside overlapping exclusive ranges") {
  RangeLock lock;
  constexpr int kCells = 16;
  std::atomic<int> readers[kCells] = {};
  std::atomic<int> writers[kCells] = {};
  std::atomic<bool> clash = false;
  const auto work = [&](unsigned seed) {
    for (int i = 0; i < 3000; ++i) {
      seed = seed * 1664525 + 1013904223;
      const uint64_t begin = seed >> 8 & 15;
      const uint64_t length = 1 + (seed >> 16) % (kCells - begin);
      const bool writes = (seed >> 28 & 3) == 0;
      const auto lease = writes ? exclusive(lock, range(begin, length)) : shared(lock, range(begin, length));
      for (uint64_t cell = begin; cell < begin + length; ++cell) {
        if (writes) {
          if (writers[cell]++ != 0 || readers[cell] != 0) clash = true;
        } else {
          ++readers[cell];
          if (writers[cell] != 0) clash = true;
        }
      }
      for (uint64_t cell = begin; cell < begin + length; ++cell) writes ? --writers[cell] : --readers[cell];
    }
  };
  std::vector<std::thread> threads;
  for (unsigned seed = 1; seed <= 4; ++seed) threads.emplace_back(work, seed);
  for (std::thread& thread : threads) thread.join();

  CHECK_FALSE(clash);
}
