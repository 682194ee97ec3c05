// Who is working on which guest bytes.
#pragma once

#include <boost/intrusive/list.hpp>

#include "base/mutex.h"
#include "imgfuse/units.h"

namespace imgfuse {

/// Readers and in-place writers share a range; whoever changes a mapping (allocating write, zeroing, discard) has it
/// alone. First come, first served among requests that overlap, so that readers cannot starve a writer. Take one lease
/// for a whole request: a second one may wait for ourselves. Rank 1. Any thread may call; taking a lease may block.
/// Costs one pass over the leases in being, which are as many as there are requests in flight.
class RangeLock {
  enum class Mode { shared, exclusive };

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
  };

  Lease shared(GuestRange range) { return {*this, range, Mode::shared}; }
  Lease exclusive(GuestRange range) { return {*this, range, Mode::exclusive}; }

 private:
  void enter(Lease& lease) EXCLUDES(mutex_);
  void leave(Lease& lease) EXCLUDES(mutex_);
  bool must_wait(const Lease& lease) const REQUIRES(mutex_);

  mutable Mutex mutex_;
  ConditionVariable released_;
  boost::intrusive::list<Lease> queue_ GUARDED_BY(mutex_);  // granted and waiting, oldest first
  unsigned waiting_ GUARDED_BY(mutex_) = 0;
};

}  // namespace imgfuse
