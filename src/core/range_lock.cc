#include "core/range_lock.h"

#include <algorithm>

#include "base/math.h"

namespace imgfuse {
namespace {

constexpr uint64_t kSector = 512;
constexpr unsigned kCountBits = 24;

/// Threads begin to look at different places.
size_t first_choice() {
  static std::atomic<size_t> threads = 0;
  static thread_local const size_t own = threads++;
  return own;
}

}  // namespace

/// 0 if it is too long, or too far away.
uint64_t RangeLock::pack(GuestRange range) {
  const uint64_t first = range.begin.bytes() / kSector;
  const uint64_t count = divide_up(range.end().bytes(), kSector) - first;
  return first >> (64 - kCountBits) != 0 || count >> kCountBits != 0 ? 0 : first << kCountBits | count;
}

GuestRange RangeLock::unpack(uint64_t sectors) {
  const uint64_t count = sectors & ((uint64_t{1} << kCountBits) - 1);
  return {GuestOffset((sectors >> kCountBits) * kSector), count * kSector};
}

/// A slot counts only if nobody came for a range alone before it was filled: who does so raises exclusive_ first, and
/// looks at the slots then. All of these are in one order (seq_cst), so one of the two sees the other.
RangeLock::Slot* RangeLock::take_slot(GuestRange range) {
  const uint64_t sectors = pack(range);
  if (exclusive_ != 0 || sectors == 0) return nullptr;
  const size_t first = first_choice();
  for (size_t i = 0; i < 4; ++i) {
    Slot& slot = slots_[(first + i) % slots_.size()];
    uint64_t none = 0;
    if (slot.sectors.load(std::memory_order_relaxed) != none || !slot.sectors.compare_exchange_strong(none, sectors))
      continue;
    if (exclusive_ == 0) return &slot;
    free_slot(slot);
    break;
  }
  return nullptr;
}

void RangeLock::free_slot(Slot& slot) {
  slot.sectors = 0;
  if (exclusive_ == 0) return;
  Lock lock(mutex_);
  if (waiting_ > 0) released_.notify_all();
}

bool RangeLock::must_wait(const Lease& lease) const {
  for (const Lease& older : queue_) {
    if (&older == &lease) break;
    const bool both_shared = older.mode_ == Mode::shared && lease.mode_ == Mode::shared;
    if (!both_shared && older.range_.overlaps(lease.range_)) return true;
  }
  if (lease.mode_ == Mode::shared) return false;
  return std::any_of(slots_.begin(), slots_.end(), [&](const Slot& slot) {
    const uint64_t sectors = slot.sectors;
    return sectors != 0 && unpack(sectors).overlaps(lease.range_);
  });
}

void RangeLock::enter(Lease& lease) {
  if (lease.mode_ == Mode::shared) lease.slot_ = take_slot(lease.range_);
  if (lease.slot_) return;
  Lock lock(mutex_);
  queue_.push_back(lease);
  if (lease.mode_ == Mode::exclusive) ++exclusive_;
  if (!must_wait(lease)) return;
  ++waiting_;
  do released_.wait(lock);
  while (must_wait(lease));
  --waiting_;
}

void RangeLock::leave(Lease& lease) {
  if (lease.slot_) return free_slot(*lease.slot_);
  Lock lock(mutex_);
  queue_.erase(queue_.iterator_to(lease));
  if (lease.mode_ == Mode::exclusive) --exclusive_;
  if (waiting_ > 0) released_.notify_all();
}

}  // namespace imgfuse
