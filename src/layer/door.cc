#include "layer/door.h"

#include <algorithm>

namespace imgfuse::layer {
namespace {

unsigned number_of_this_thread() {
  static std::atomic<unsigned> threads = 0;
  static thread_local const unsigned number = threads.fetch_add(1, std::memory_order_relaxed);
  return number;
}

}  // namespace

// All of these are in one total order (seq_cst). Who enters counts itself and then looks at the flag; who closes sets
// the flag and then looks at the counts: one of them sees the other.

std::atomic<uint64_t>& Door::enter() {
  std::atomic<uint64_t>& slot = slots_[number_of_this_thread() % slots_.size()].inside;
  slot.fetch_add(1);
  while (closed_.load()) {
    leave(slot);
    wait_outside();
    slot.fetch_add(1);
  }
  return slot;
}

void Door::leave(std::atomic<uint64_t>& slot) {
  slot.fetch_sub(1);
  if (!closed_.load()) return;
  const Lock lock(mutex_);
  changed_.notify_all();
}

void Door::wait_outside() {
  Lock lock(mutex_);
  while (closed_.load()) changed_.wait(lock);
}

bool Door::is_empty() const {
  return std::all_of(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.inside.load() == 0; });
}

void Door::close() {
  Lock lock(mutex_);
  while (closed_.load()) changed_.wait(lock);
  closed_.store(true);
  while (!is_empty()) changed_.wait(lock);
}

void Door::open() {
  const Lock lock(mutex_);
  closed_.store(false);
  changed_.notify_all();
}

}  // namespace imgfuse::layer
