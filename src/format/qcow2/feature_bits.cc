#include "format/qcow2/feature_bits.h"

#include <span>

#include "base/endian.h"

namespace imgfuse::qcow2 {

Result<> FeatureBits::change(uint64_t set, uint64_t clear) {
  Lock lock(mutex_);
  const uint64_t next = (incompatible_ | set) & ~clear;
  const be<uint64_t> field(next);
  IMG_TRY(storage_.write(kIncompatibleField, std::as_bytes(std::span(&field, 1))));
  incompatible_ = next;
  return {};
}

}  // namespace imgfuse::qcow2
