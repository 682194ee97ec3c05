// The incompatible feature bits of an open image, which change while it is open.
#pragma once

#include <atomic>

#include "base/mutex.h"
#include "format/qcow2/header.h"

namespace imgfuse::qcow2 {

/// The one who writes that field of the header: what sets one bit must not lose another. Version 3 only. Any thread.
class FeatureBits {
 public:
  FeatureBits(Storage& storage, const Header& header) : storage_(storage), incompatible_(header.incompatible) {}

  bool has(uint64_t bits) const { return (incompatible_.load(std::memory_order_relaxed) & bits) != 0; }
  /// Writes the field with these bits set, or without them. The caller flushes. Blocks.
  Result<> set(uint64_t bits) EXCLUDES(mutex_) { return change(bits, 0); }
  Result<> clear(uint64_t bits) EXCLUDES(mutex_) { return change(0, bits); }

 private:
  Result<> change(uint64_t set, uint64_t clear) EXCLUDES(mutex_);

  Storage& storage_;
  Mutex mutex_{LockRank::header};  // held across the write: a flush cycle and a request may both have bits to set
  std::atomic<uint64_t> incompatible_;
};

}  // namespace imgfuse::qcow2
