// The first fatal error of a disk, kept until it is opened again.
#pragma once

#include <atomic>
#include <cassert>
#include <optional>
#include <utility>

#include "base/log.h"
#include "base/mutex.h"
#include "imgfuse/error.h"

namespace imgfuse {

/// After a failed metadata write or host flush nobody knows what is durable; a later success would be a lie. Writes
/// and flushes check the latch first, reads do not. Any thread may call; check() costs one atomic load.
class Latch {
 public:
  Result<> check() const {
    if (!set_.load(std::memory_order_acquire)) return {};
    Lock lock(mutex_);
    return fail(*error_);
  }

  /// Keeps the first error and logs it; later ones change nothing.
  void set(const Error& error) {
    assert(error.code() != ErrorCode::would_wait);
    Lock lock(mutex_);
    if (error_) return;
    log_error("{}; no more writes until the image is opened again", error.text());
    error_ = error;
    set_.store(true, std::memory_order_release);
  }

 private:
  std::atomic<bool> set_ = false;
  mutable Mutex mutex_;
  std::optional<Error> error_ GUARDED_BY(mutex_);
};

}  // namespace imgfuse
