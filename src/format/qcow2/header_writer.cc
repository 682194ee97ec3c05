#include "format/qcow2/header_writer.h"

#include <span>

#include "base/endian.h"
#include "format/qcow2/header_update.h"

namespace imgfuse::qcow2 {

Result<> HeaderWriter::change(uint64_t set, uint64_t clear) {
  Lock lock(mutex_);
  const uint64_t next = (incompatible_ | set) & ~clear;
  const be<uint64_t> field(next);
  IMG_TRY(storage_.write(kIncompatibleField, std::as_bytes(std::span(&field, 1))));
  incompatible_ = next;
  return {};
}

Result<> HeaderWriter::write(HostOffset field, ConstBytes bytes) {
  Lock lock(mutex_);
  return storage_.write(field, bytes);
}

Result<> HeaderWriter::set_counts_ahead(bool ahead) {
  Lock lock(mutex_);
  if (counts_ahead_ == ahead) return {};
  IMG_LET(Header header, read_header(storage_, Purpose::info));
  header.counts_ahead = ahead;
  IMG_TRY(replace_header(storage_, header));
  counts_ahead_ = ahead;
  return {};
}

}  // namespace imgfuse::qcow2
