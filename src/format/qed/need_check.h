// The NEED_CHECK bit: whoever opens the image next has to check it.
#pragma once

#include <atomic>

#include "base/latch.h"
#include "base/mutex.h"
#include "format/qed/header.h"

namespace imgfuse::qed {

/// On disk while tables may be changing, of an image without a backing file (with one, QEMU keeps another order and
/// leaves the bit alone). Also keeps the header, which is written with the bit.
///
/// Setting goes on beside other requests; clearing is done while there are none.
class NeedCheck {
 public:
  NeedCheck(Storage& storage, Header header, Latch& latch)
      : storage_(storage), latch_(latch), used_(!header.backing_name), header_(std::move(header)) {}

  /// Before a change of a table: the bit is durable when this returns. Costs an atomic load where it is set already.
  Result<> set() EXCLUDES(mutex_);
  /// Takes the bit off; not durable yet. Everything else has to be durable, and no change may be on its way.
  Result<> clear() EXCLUDES(mutex_);
  bool is_set() const { return set_.load(std::memory_order_acquire); }
  /// Changes of tables since the image was opened, up to those that are on their way.
  uint64_t changes() const { return changes_.load(std::memory_order_acquire); }

  /// Records another disk size, durably.
  Result<> write_size(uint64_t image_size) EXCLUDES(mutex_);

 private:
  Result<> write(bool durable) REQUIRES(mutex_);

  Storage& storage_;
  Latch& latch_;
  const bool used_;
  std::atomic<bool> set_ = false;
  std::atomic<uint64_t> changes_ = 0;

  Mutex mutex_{LockRank::tables};  // held while the header is written
  Header header_ GUARDED_BY(mutex_);
};

}  // namespace imgfuse::qed
