#include "base/mutex.h"

#include <doctest/doctest.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "base/per_cpu.h"
#include "support/gate_storage.h"

namespace imgfuse {
namespace {

using test::in_background;
using test::waits;

/// One whose waiters sleep, and one whose waiters try first.
constexpr LockRank kRanks[] = {LockRank::door, LockRank::metadata};

/// From here on the calling thread runs on that CPU alone, if it may.
void run_on(long cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<size_t>(cpu), &set);
  (void)::sched_setaffinity(0, sizeof set, &set);
}

TEST_CASE("shared mutex: who wants it alone waits for those who share it, who comes later for him") {
  for (const LockRank rank : kRanks) {
    SharedMutex mutex(rank);
    std::atomic<bool> shared = false, stop_sharing = false;
    auto inside = in_background([&] {
      const SharedLock share(mutex);
      shared = true;
      shared.notify_all();
      stop_sharing.wait(false);
    });
    shared.wait(false);
    auto beside = in_background([&] { const SharedLock share(mutex); });
    CHECK(beside.has_ended_within(std::chrono::minutes(1)));
    std::atomic<bool> alone = false, stop_change = false;
    auto change = in_background([&] {
      const ExclusiveLock lock(mutex);
      alone = true;
      alone.notify_all();
      stop_change.wait(false);
    });
    CHECK(waits(change));
    CHECK(!alone);
    auto late = in_background([&] { const SharedLock share(mutex); });
    CHECK(waits(late));

    stop_sharing = true;
    stop_sharing.notify_all();
    inside.get();
    alone.wait(false);
    CHECK(waits(late));

    stop_change = true;
    stop_change.notify_all();
    change.get();
    late.get();
  }
}

TEST_CASE("shared mutex: those who have it alone have it one after the other, and nobody shares it meanwhile") {
  for (const LockRank rank : kRanks) {
    SharedMutex mutex(rank);
    uint64_t guarded = 0;  // plain: the sanitizer would see a look beside a change
    std::atomic<bool> stop = false, torn = false;
    std::vector<std::thread> readers, writers;
    for (int i = 0; i < 3; ++i)
      readers.emplace_back([&] {
        while (!stop) {
          const SharedLock share(mutex);
          if (guarded % 2 != 0) torn = true;
          if (guarded % 64 == 0) std::this_thread::yield();  // to leave on another CPU than it came on
        }
      });
    for (int i = 0; i < 2; ++i)
      writers.emplace_back([&] {
        for (int round = 0; round < 2000; ++round) {
          const ExclusiveLock lock(mutex);
          ++guarded;
          if (round % 64 == 0) std::this_thread::yield();
          ++guarded;
        }
      });
    for (std::thread& writer : writers) writer.join();
    stop = true;
    for (std::thread& reader : readers) reader.join();

    CHECK(!torn);
    CHECK(guarded == 8000);
  }
}

TEST_CASE("shared mutex: who has been moved to another CPU leaves it there") {
  const long cpus = ::sysconf(_SC_NPROCESSORS_ONLN);
  for (const LockRank rank : kRanks) {
    SharedMutex mutex(rank);
    for (long first = 0; first < cpus; ++first) {
      in_background([&] {
        run_on(first);
        mutex.lock_shared();
        run_on((first + 1) % cpus);
        mutex.unlock_shared();
      }).get();
    }
    in_background([&] { const ExclusiveLock lock(mutex); }).get();
  }
}

TEST_CASE("counter: what threads add is there when they have ended") {
  Counter counter;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] {
      for (int n = 0; n < 10000; ++n) counter.add(3);
    });
  for (std::thread& thread : threads) thread.join();

  CHECK(counter.get() == 120000);
}

}  // namespace
}  // namespace imgfuse
