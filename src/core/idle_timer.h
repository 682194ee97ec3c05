// Does something once nothing has happened for a while.
#pragma once

#include <functional>
#include <thread>

#include "base/clock.h"
#include "base/mutex.h"

namespace imgfuse {

/// Calls `act` when the last touch() was `period` ago: once, until the next touch(). Has a thread of its own, from the
/// first touch() to stop(), in which `act` runs without a lock of the timer.
class IdleTimer {
 public:
  IdleTimer(Clock& clock, Clock::Time::duration period, std::function<void()> act)
      : clock_(clock), period_(period), act_(std::move(act)) {}
  ~IdleTimer() { stop(); }
  IdleTimer(const IdleTimer&) = delete;
  IdleTimer& operator=(const IdleTimer&) = delete;

  /// Something happens at this moment. Any thread; never blocks for long.
  void touch() EXCLUDES(mutex_);
  /// Waits for an `act` that runs. Nothing is called afterwards; nobody may call touch() any more.
  void stop() EXCLUDES(mutex_);

 private:
  void run() EXCLUDES(mutex_);

  Clock& clock_;
  const Clock::Time::duration period_;
  const std::function<void()> act_;

  Mutex mutex_;
  ConditionVariable changed_;
  std::thread thread_ GUARDED_BY(mutex_);
  Clock::Time last_ GUARDED_BY(mutex_);
  bool armed_ GUARDED_BY(mutex_) = false;
  bool stopped_ GUARDED_BY(mutex_) = false;
};

}  // namespace imgfuse
