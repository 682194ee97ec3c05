// GateStorage: holds a chosen call until the test lets it go.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
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

/// Runs `f` in a thread of its own.
template <class F>
auto in_background(F f) {
  return std::async(std::launch::async, std::move(f));
}

/// Whether the thread behind `future` is still at work after a moment: it waits for something. A wrong "yes" is
/// possible on a slow machine, a wrong "no" is not, so a test may require it without becoming unreliable.
template <class T>
bool waits(const std::future<T>& future) {
  return future.wait_for(std::chrono::milliseconds(30)) == std::future_status::timeout;
}

}  // namespace imgfuse::test
