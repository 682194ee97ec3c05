// Which requests of a ring's queue are likely to wait for a disk, by what those before them did.
#pragma once

#include <chrono>
#include <cstdint>

#include "base/no_wait.h"
#include "fuse/ring_entry.h"

namespace imgfuse::fuse {

/// A queue's thread asks it before it answers a request, and tells it of what it answered. Not thread-safe.
class DiskWaits {
 public:
  /// `depth`: how many requests a queue has at once.
  explicit DiskWaits(unsigned depth) : depth_(depth) {}

  /// Whether the request is better answered by a thread that has nothing else to do: it always waits, or others did a
  /// while ago. READs count only while they may wait without a word.
  bool expects(const RingEntry& entry);

  /// Has a request answered, and says whether that took long. The first that does has those behind it looked at more
  /// closely, until one of them slept.
  template <class Answer>
  bool watch(const RingEntry& entry, Answer answer) {
    const bool closely = watched_ > 0;
    if (closely) --watched_;
    const bool slow = is_slow(entry, closely, answer);
    if (slow) watched_ = depth_;
    if (slow && closely) slow_ = depth_;
    return slow;
  }
  /// The same in a thread that may sleep; the answer is for helper_was().
  template <class Answer>
  static bool watch_helper(const RingEntry& entry, Answer answer) {
    return is_slow(entry, true, answer);
  }
  void helper_was(bool slow) {
    if (slow) slow_ = depth_;
  }

  /// Whether READs may wait although they do not want to: the host cannot tell what is in memory.
  bool blind() const { return blind_ > 0; }
  /// After a READ that did not want to wait.
  void note(const NoWait& hurry);

 private:
  /// That an answer had to wait for a disk is told by that it took long; and, for one more system call, that the thread
  /// slept, rather than lost its CPU to another one.
  template <class Answer>
  static bool is_slow(const RingEntry& entry, bool closely, Answer answer) {
    constexpr auto kLong = std::chrono::microseconds(50);
    const std::chrono::nanoseconds copying(entry.length());
    const long slept = closely ? times_slept() : 0;
    const auto begun = NoWait::Clock::now();
    answer();
    if (NoWait::Clock::now() - begun <= kLong + copying) return false;
    return !closely || times_slept() != slept;
  }
  static long times_slept();

  const unsigned depth_;
  unsigned blind_ = 0;    // so many READs more may wait without a word
  unsigned watched_ = 0;  // so many requests more are watched closely
  unsigned slow_ = 0;     // so many requests more are expected to wait
};

}  // namespace imgfuse::fuse
