// Who is working on which guest bytes.
#pragma once

#include <boost/intrusive/list.hpp>

#include <array>
#include <atomic>

#include "base/mutex.h"
#include "imgfuse/units.h"

namespace imgfuse {

/// Readers and in-place writers share a range; whoever changes a mapping (allocating write, zeroing, discard) has it
/// alone. First come, first served among requests that overlap, so that readers cannot starve a writer. Take one lease
/// for a whole request: a second one may wait for ourselves. Rank 1. Any thread may call; taking a lease may block.
///
/// While nobody has or wants a range alone, a lease takes no mutex: it writes its range into a slot that is free. Else
/// it costs one pass over the leases in being, which are as many as there are requests in flight.
class RangeLock {
  enum class Mode { shared, exclusive };

  /// A shared range in sectors, in one word: the first one above, how many in the lowest 24 bits. 0: free.
  struct alignas(64) Slot {
    std::atomic<uint64_t> sectors = 0;
  };

 public:
  class [[nodiscard]] Lease : public boost::intrusive::list_base_hook<> {
   public:
    ~Lease() { owner_.leave(*this); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

   private:
    friend class RangeLock;
    Lease(RangeLock& owner, GuestRange range, Mode mode) : owner_(owner), range_(range), mode_(mode) {
      owner_.enter(*this);
    }

    RangeLock& owner_;
    const GuestRange range_;
    const Mode mode_;
    Slot* slot_ = nullptr;  // else it is in queue_
  };

  Lease shared(GuestRange range) { return {*this, range, Mode::shared}; }
  Lease exclusive(GuestRange range) { return {*this, range, Mode::exclusive}; }

 private:
  void enter(Lease& lease) EXCLUDES(mutex_);
  void leave(Lease& lease) EXCLUDES(mutex_);
  static uint64_t pack(GuestRange range);
  static GuestRange unpack(uint64_t sectors);
  Slot* take_slot(GuestRange range) EXCLUDES(mutex_);
  void free_slot(Slot& slot) EXCLUDES(mutex_);
  bool must_wait(const Lease& lease) const REQUIRES(mutex_);

  std::array<Slot, 32> slots_;
  std::atomic<unsigned> exclusive_ = 0;  // leases in queue_; changed under mutex_

  mutable Mutex mutex_;
  ConditionVariable released_;
  boost::intrusive::list<Lease> queue_ GUARDED_BY(mutex_);  // granted and waiting, oldest first
  unsigned waiting_ GUARDED_BY(mutex_) = 0;
};

}  // namespace imgfuse
