// Changes of the header while the image is open.
#pragma once

#include <atomic>

#include "base/mutex.h"
#include "format/qcow2/header.h"

namespace imgfuse::qcow2 {

/// The one who writes to the header: no change loses another. Any thread.
class HeaderWriter {
 public:
  HeaderWriter(Storage& storage, const Header& header)
      : storage_(storage), incompatible_(header.incompatible), counts_ahead_(header.counts_ahead) {}

  /// Incompatible features; version 3 only.
  bool has(uint64_t bits) const { return (incompatible_.load(std::memory_order_relaxed) & bits) != 0; }
  /// Writes the field with these bits set, or without them. The caller flushes. Blocks.
  Result<> set(uint64_t bits) EXCLUDES(mutex_) { return change(bits, 0); }
  Result<> clear(uint64_t bits) EXCLUDES(mutex_) { return change(0, bits); }

  /// Some neighbouring fields. The caller flushes. Blocks.
  Result<> write(HostOffset field, ConstBytes bytes) EXCLUDES(mutex_);

  /// Header::counts_ahead, durable when it returns. `no_space` and nothing changed where the header has no room for it.
  /// Blocks.
  Result<> set_counts_ahead(bool ahead) EXCLUDES(mutex_);

 private:
  Result<> change(uint64_t set, uint64_t clear) EXCLUDES(mutex_);

  Storage& storage_;
  Mutex mutex_{LockRank::header};  // held across the I/O
  std::atomic<uint64_t> incompatible_;
  bool counts_ahead_ GUARDED_BY(mutex_);
};

}  // namespace imgfuse::qcow2
