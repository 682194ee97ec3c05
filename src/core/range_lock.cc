#include "core/range_lock.h"

namespace imgfuse {

bool RangeLock::must_wait(const Lease& lease) const {
  for (const Lease& older : queue_) {
    if (&older == &lease) break;
    const bool both_shared = older.mode_ == Mode::shared && lease.mode_ == Mode::shared;
    if (!both_shared && older.range_.overlaps(lease.range_)) return true;
  }
  return false;
}

void RangeLock::enter(Lease& lease) {
  Lock lock(mutex_);
  queue_.push_back(lease);
  if (!must_wait(lease)) return;
  ++waiting_;
  do released_.wait(lock);
  while (must_wait(lease));
  --waiting_;
}

void RangeLock::leave(Lease& lease) {
  Lock lock(mutex_);
  queue_.erase(queue_.iterator_to(lease));
  if (waiting_ > 0) released_.notify_all();
}

}  // namespace imgfuse
