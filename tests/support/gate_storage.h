// Threads that wait: GateStorage holds a chosen call until the test lets it go; waits() tells when a thread sleeps.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "base/mutex.h"
#include "support/intercepted_storage.h"

namespace imgfuse::test {

/// Where a call is held: before anything happened, or when it is done but its caller does not know yet.
enum class Point { before, after };

/// One place at which calls stop. Opens when the test lets go of it.
class Gate {
 public:
  Gate(CallSet calls, std::function<bool(HostRange)> wanted, Point point)
      : calls_(calls), wanted_(std::move(wanted)), point_(point) {}

  /// Blocks until a call is held here.
  void wait_for_arrival() EXCLUDES(mutex_);
  /// Lets the held call go; later ones pass.
  void open() EXCLUDES(mutex_);
  bool has_arrived() const EXCLUDES(mutex_);

 private:
  friend class GateStorage;
  void pass(Call call, HostRange range, Point point) EXCLUDES(mutex_);

  const CallSet calls_;
  const std::function<bool(HostRange)> wanted_;
  const Point point_;

  mutable Mutex mutex_;
  ConditionVariable changed_;
  bool arrived_ GUARDED_BY(mutex_) = false;
  bool open_ GUARDED_BY(mutex_) = false;
};

/// Thread-safe. Holds the first call that fits each gate; others pass while it is held.
class GateStorage final : public InterceptedStorage {
 public:
  using InterceptedStorage::InterceptedStorage;

  /// Gate for the next call of one of these kinds whose range satisfies `wanted` (empty: any).
  std::shared_ptr<Gate> hold(CallSet calls, Point point = Point::before, std::function<bool(HostRange)> wanted = {})
      EXCLUDES(mutex_);

 private:
  Result<> before(Call call, HostRange range) override;
  void after(Call call, HostRange range) override;
  void pass(Call call, HostRange range, Point point) EXCLUDES(mutex_);

  Mutex mutex_;
  std::vector<std::weak_ptr<Gate>> gates_ GUARDED_BY(mutex_);
};

/// A thread of its own that runs already, and what comes of it.
template <class T>
class Background {
 public:
  Background(pid_t thread, std::future<T> result) : thread_(thread), result_(std::move(result)) {}

  T get() { return result_.get(); }
  pid_t thread() const { return thread_; }
  bool has_ended_within(std::chrono::milliseconds time) const {
    return result_.wait_for(time) == std::future_status::ready;
  }

 private:
  const pid_t thread_;
  std::future<T> result_;
};

/// What it takes to run a thread, compiled once for each type of value and not for each function.
template <class Value>
Background<Value> run_in_background(std::function<Value()> f) {
  std::promise<pid_t> started;
  std::future<pid_t> thread = started.get_future();
  auto result = std::async(std::launch::async, [started = std::move(started), f = std::move(f)]() mutable {
    started.set_value(::gettid());
    return f();
  });
  return Background(thread.get(), std::move(result));
}

/// Runs `f` in a thread of its own.
template <class F>
auto in_background(F f) {
  return run_in_background(std::function<std::invoke_result_t<F&>()>(std::move(f)));
}

/// How often a thread has gone to sleep, if it sleeps now.
std::optional<uint64_t> sleep_of(pid_t thread);

/// Whether what runs in the background has come to a place where it waits for something: it sleeps, and goes on
/// sleeping for a moment. A thread that the machine leaves without a CPU does not sleep; where it may wait for one that
/// is left without, a "yes" may come too early.
template <class T>
bool waits(const Background<T>& background) {
  std::optional<uint64_t> before;
  while (!background.has_ended_within(std::chrono::milliseconds(10))) {
    const std::optional<uint64_t> sleep = sleep_of(background.thread());
    if (sleep && sleep == before) return true;
    before = sleep;
  }
  return false;
}

}  // namespace imgfuse::test
