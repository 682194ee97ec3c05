// Reads that fail rather than wait for a disk.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

#include "imgfuse/error.h"

namespace imgfuse {

/// While it lives, reads of host files by this thread fail with ErrorCode::would_wait where they would have to wait for
/// a disk. For a thread that has others to serve meanwhile: it asks again when what was missing has come, or has
/// another thread ask that may wait. Only for requests that change nothing. Locks and leases are waited for as ever,
/// and a file system that cannot tell whether a read would wait makes it wait all the same.
class NoWait {
 public:
  using Clock = std::chrono::steady_clock;

  /// Has missing parts brought into memory.
  class Fetcher {
   public:
    virtual ~Fetcher() = default;
    /// A part of a host file, which is open until this returns, is not in memory. Must not wait.
    virtual void fetch(int file, uint64_t offset, size_t length) = 0;
  };

  /// `since`: when the request was asked the first time.
  NoWait(Fetcher& fetcher, Clock::time_point since) : fetcher_(fetcher), since_(since), outer_(current_) {
    current_ = this;
  }
  ~NoWait() { current_ = outer_; }
  NoWait(const NoWait&) = delete;
  NoWait& operator=(const NoWait&) = delete;

  /// The calling thread's, or null.
  static NoWait* current() { return current_; }

  Clock::time_point since() const { return since_; }
  /// Whether a read has failed because it would have waited.
  bool missed() const { return missed_; }
  /// Whether a read may have waited: of a file whose host cannot tell what is in memory.
  bool may_have_waited() const { return may_have_waited_; }

  /// What a reader returns that would have to wait: for a part of a file, or for something that cannot be fetched.
  tl::unexpected<Error> miss(int file, uint64_t offset, size_t length) {
    fetcher_.fetch(file, offset, length);
    return miss();
  }
  tl::unexpected<Error> miss() {
    missed_ = true;
    return fail(Error(ErrorCode::would_wait, {}));
  }
  void note_blind_read() { may_have_waited_ = true; }

 private:
  Fetcher& fetcher_;
  const Clock::time_point since_;
  NoWait* const outer_;
  bool missed_ = false;
  bool may_have_waited_ = false;
  static inline thread_local NoWait* current_ = nullptr;
};

/// Whether it says nothing of the request but that it has to be asked for again.
template <class T>
bool would_wait(const Result<T>& result) {
  return !result && result.error().code() == ErrorCode::would_wait;
}

}  // namespace imgfuse
