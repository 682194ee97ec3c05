// Flush cycles: everything dirty goes to the host in stages with a barrier behind each.
#pragma once

#include <cstdint>

#include "base/latch.h"
#include "base/mutex.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"

namespace imgfuse {

/// Runs one flush cycle at a time (rank 4).
///
///   cut        the client freezes what is dirty              short, no I/O
///   stage 0    what must be durable before anything points at it
///   barrier    it covers guest data too; left to the last stage if the client needs none here
///   stage 1    the pointers                                  skipped, with its barrier, when there are none
///   barrier
///   end        frozen tables thaw; what was unmapped may be freed
///
/// Callers that arrive while a cycle runs wait for the next one, which serves them all. A failed cycle sets the latch.
class Flusher {
 public:
  /// The disk whose metadata is flushed. Called by one thread at a time.
  class Client {
   public:
    virtual ~Client() = default;
    virtual void cut() = 0;
    /// Returns whether anything was written.
    virtual Result<bool> write_stage(unsigned stage) = 0;
    /// Whether guest data and what this stage wrote must be durable before the next stage writes.
    virtual bool needs_barrier(unsigned stage) const {
      (void)stage;
      return true;
    }
    virtual void end_cycle(bool durable) = 0;
  };

  Flusher(Storage& storage, Client& client, unsigned stages, Latch& latch)
      : storage_(storage), client_(client), stages_(stages), latch_(latch) {}

  /// Everything that was changed before the call is durable when it returns. Blocks. Any thread, holding no lock
  /// of rank 5 or above.
  Result<> flush() EXCLUDES(mutex_);

  uint64_t cycles() const EXCLUDES(mutex_);

 private:
  Result<> run_cycle();

  Storage& storage_;
  Client& client_;
  const unsigned stages_;
  Latch& latch_;

  mutable Mutex mutex_;
  ConditionVariable ended_;
  uint64_t begun_ GUARDED_BY(mutex_) = 0;  // cycles
  uint64_t done_ GUARDED_BY(mutex_) = 0;
};

}  // namespace imgfuse
