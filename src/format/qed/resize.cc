// Growing the virtual disk.
#include <algorithm>
#include <limits>

#include "base/math.h"
#include "format/qed/qed_disk.h"

namespace imgfuse::qed {

Result<> QedDisk::do_resize(uint64_t size, ResizeOptions options) {
  const Header& header = image_.header;
  if (size % 512 != 0) return fail(ErrorCode::invalid, "size {} is not a multiple of 512", size);
  if (const uint64_t limit = max_image_size(header.cluster_size, header.table_size); size > limit)
    return fail(ErrorCode::invalid, "size {} is past the largest disk of this image, {}", size, limit);
  if (options.preallocation != Preallocation::off)
    return fail(ErrorCode::unsupported, "a QED image cannot be preallocated");
  const auto lease = ranges_.exclusive({GuestOffset(0), std::numeric_limits<uint64_t>::max()});
  IMG_TRY(latch_.check());
  const uint64_t old_size = do_size();
  if (size == old_size) return {};
  if (size < old_size) return fail(ErrorCode::unsupported, "a QED image cannot shrink, from {} to {}", old_size, size);
  return note(grow(old_size, size));
}

/// What lies behind the old end must read as zeros: old content of the last cluster, a longer backing file, what a
/// growth left that did not succeed.
Result<> QedDisk::grow(uint64_t old_size, uint64_t size) {
  IMG_TRY(map_.load_more(size));
  const uint64_t used_end = std::max({round_up(old_size, image_.geometry.cluster_size), map_.tables_end().bytes(),
                                      round_up(backing_size_, image_.geometry.cluster_size)});
  const uint64_t dirty_end = std::min(round_up(size, image_.geometry.cluster_size), used_end);
  if (dirty_end > old_size) IMG_TRY(zero_range({GuestOffset(old_size), dirty_end - old_size}, Zeroing::may_free));
  IMG_TRY(flusher_.flush());
  IMG_TRY(need_check_.write_size(size));
  size_ = size;
  return {};
}

}  // namespace imgfuse::qed
