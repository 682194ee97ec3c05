// Mutexes whose waiters may try for a while before they sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "base/per_cpu.h"

namespace imgfuse {

/// Tells the CPU that the caller looks at the same memory again and again.
inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Whether `done()` came true within so many tries.
template <class Done>
bool try_for_a_while(int tries, Done done) {
  for (int i = 0; i < tries; ++i) {
    if (done()) return true;
    pause_cpu();
  }
  return false;
}

/// A mutex that is tried `tries` times before its holder is waited for.
class PatientMutex {
 public:
  explicit PatientMutex(int tries) : tries_(tries) {}

  void lock() {
    if (!try_for_a_while(tries_, [this] { return mutex_.try_lock(); })) mutex_.lock();
  }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
  const int tries_;
};

/// Readers share it, and who changes something has it alone; he goes before readers that come later. A thread must not
/// share it twice. What a reader pays does not grow with the CPUs that read: an addition to a counter of his CPU, and a
/// look at a flag that only writers change. A writer looks at all counters.
class PatientSharedMutex {
 public:
  explicit PatientSharedMutex(int tries) : tries_(tries), writers_(tries) {}

  void lock() {
    writers_.lock();
    closed_.store(true);
    if (try_for_a_while(tries_, [this] { return is_empty(); })) return;
    for (;;) {
      const uint32_t seen = departures_.load();
      if (is_empty()) return;
      departures_.wait(seen);
    }
  }

  void unlock() {
    closed_.store(false);
    writers_.unlock();
  }

  void lock_shared() {
    std::atomic<uint64_t>& here = inside_.here();
    here.fetch_add(1);
    if (!closed_.load()) return;
    leave(here);
    writers_.lock();  // nobody can close it meanwhile
    inside_.here().fetch_add(1);
    writers_.unlock();
  }

  void unlock_shared() { leave(inside_.here()); }

 private:
  // The operations on closed_ and inside_ are in one order (seq_cst): a reader counts himself and then looks at the
  // flag, a writer sets the flag and then looks at the counters, so one of them sees the other.
  //
  // Who was moved to another CPU leaves there, and one counter goes below zero for it: it is the sum that says how many
  // are inside. A writer that adds up while they leave may count too many, and looks again; never too few, since who
  // comes while it is closed takes himself back where he counted himself.

  bool is_empty() const {
    uint64_t sum = 0;
    inside_.for_each([&](const std::atomic<uint64_t>& count) { sum += count.load(); });
    return sum == 0;
  }

  void leave(std::atomic<uint64_t>& count) {
    count.fetch_sub(1);
    if (!closed_.load()) return;
    departures_.fetch_add(1);
    departures_.notify_one();
  }

  PerCpu<std::atomic<uint64_t>> inside_;
  std::atomic<bool> closed_ = false;
  std::atomic<uint32_t> departures_ = 0;
  const int tries_;
  PatientMutex writers_;
};

}  // namespace imgfuse
