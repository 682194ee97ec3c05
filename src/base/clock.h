// The time, which tests may have stand still.
#pragma once

#include <chrono>

#include "base/mutex.h"

namespace imgfuse {

/// Any thread.
class Clock {
 public:
  using Time = std::chrono::steady_clock::time_point;

  virtual ~Clock() = default;
  virtual Time now() const { return std::chrono::steady_clock::now(); }
  /// Waits with the lock until `deadline`, or less: the caller looks again.
  virtual void wait_until(ConditionVariable& condition, Lock& lock, Time deadline) {
    condition.wait_until(lock, deadline);
  }

  /// The host's.
  static Clock& steady() {
    static Clock clock;
    return clock;
  }
};

}  // namespace imgfuse
