// Writes tables of 64-bit entries front to back, in large pieces.
#pragma once

#include <cstring>

#include "base/buffer.h"
#include "base/endian.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"
#include "imgfuse/units.h"

namespace imgfuse::qcow2 {

/// Call finish() at the end. One thread.
class TableWriter {
 public:
  TableWriter(Storage& storage, HostOffset begin) : storage_(storage), next_(begin) {}

  Result<> entry(uint64_t value) {
    const be<uint64_t> raw = value;
    std::memcpy(piece_.data() + used_, &raw, sizeof raw);
    used_ += sizeof raw;
    return used_ == piece_.size() ? finish() : Result<>{};
  }

  Result<> finish() {
    if (used_ == 0) return {};
    IMG_TRY(storage_.write(next_, piece_.bytes().first(used_)));
    next_ = next_ + used_;
    used_ = 0;
    return {};
  }

 private:
  Storage& storage_;
  HostOffset next_;  // of the first byte in piece_
  size_t used_ = 0;
  Buffer piece_{size_t{1} << 20};
};

}  // namespace imgfuse::qcow2
