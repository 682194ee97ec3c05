// Something that all CPUs change at once, in a copy for each.
#pragma once

#include <sched.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace imgfuse {

/// A cache line goes from one CPU to another for some hundred cycles, which is what makes a counter that all requests
/// raise slow. Each CPU gets lines of its own here; some share them where there are many CPUs. A thread may be moved to
/// another CPU at any time: what is in a copy has to be changed atomically.
template <class T>
class PerCpu {
  struct alignas(64) Copy {
    T value;
  };

 public:
  T& here() { return copies_[static_cast<unsigned>(sched_getcpu()) % copies_.size()].value; }

  /// Calls `visit` with each copy.
  template <class Visit>
  void for_each(Visit visit) const {
    for (const Copy& copy : copies_) visit(copy.value);
  }

 private:
  std::array<Copy, 16> copies_ = {};
};

/// Counts what happens in any thread.
class Counter {
 public:
  void add(uint64_t count = 1) { counts_.here().fetch_add(count, std::memory_order_relaxed); }
  uint64_t get() const {
    uint64_t sum = 0;
    counts_.for_each([&](const std::atomic<uint64_t>& count) { sum += count.load(std::memory_order_relaxed); });
    return sum;
  }

 private:
  PerCpu<std::atomic<uint64_t>> counts_;
};

}  // namespace imgfuse
