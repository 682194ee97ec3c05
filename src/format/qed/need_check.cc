#include "format/qed/need_check.h"

namespace imgfuse::qed {

/// After a failure either header may be the durable one.
Result<> NeedCheck::write(bool durable) {
  Result<> written = write_header(storage_, header_);
  if (written && durable) written = storage_.flush();
  if (!written) latch_.set(written.error());
  return written;
}

Result<> NeedCheck::set() {
  changes_.fetch_add(1, std::memory_order_acq_rel);
  if (!used_ || is_set()) return {};
  Lock lock(mutex_);
  if (is_set()) return {};
  header_.features |= kNeedCheck;
  IMG_TRY(write(true));
  set_.store(true, std::memory_order_release);
  return {};
}

Result<> NeedCheck::clear() {
  Lock lock(mutex_);
  header_.features &= ~kNeedCheck;
  IMG_TRY(write(false));
  set_.store(false, std::memory_order_release);
  return {};
}

Result<> NeedCheck::write_size(uint64_t image_size) {
  Lock lock(mutex_);
  header_.image_size = image_size;
  return write(true);
}

}  // namespace imgfuse::qed
