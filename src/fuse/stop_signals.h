// Turns SIGTERM, SIGINT and SIGHUP into a call.
#pragma once

#include <functional>
#include <thread>

#include "base/unique_fd.h"

namespace imgfuse::fuse {

/// While it lives, a thread of its own waits for one of the signals, or for trigger(), and then calls `on_stop` once.
/// The signals are blocked in the thread that makes it, and in all that this one starts afterwards; make it before
/// there are others.
class StopSignals {
 public:
  explicit StopSignals(std::function<void()> on_stop);
  /// Waits for a call of `on_stop` that has begun.
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  /// As if a signal had come. Any thread may call.
  void trigger();

 private:
  void wait();
  void post(uint64_t event);

  std::function<void()> on_stop_;
  sigset_t old_mask_ = {};
  UniqueFd signals_;
  UniqueFd events_;
  std::thread thread_;
};

}  // namespace imgfuse::fuse
