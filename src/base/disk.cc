#include "imgfuse/disk.h"

#include <algorithm>

#include "base/buffer.h"
#include "base/math.h"

namespace imgfuse {

Result<> Disk::check_range(GuestOffset offset, uint64_t length) const {
  const uint64_t size = do_size();
  if (offset.bytes() > size || length > size - offset.bytes())
    return fail(ErrorCode::invalid, "range {:#x}+{:#x} lies past the end of the disk ({:#x})", offset.bytes(), length,
                size);
  return {};
}

Result<> Disk::check_writable() const {
  if (DiskInfo disk = do_info(); disk.read_only) return fail(ErrorCode::read_only, "{} is open read-only", disk.name);
  return {};
}

/// The unit that the end of the disk cuts counts as whole.
GuestRange Disk::whole_units(GuestRange range, uint32_t unit) const {
  const uint64_t begin = round_up(range.begin.bytes(), unit);
  const uint64_t end = range.end().bytes() == do_size() ? do_size() : round_down(range.end().bytes(), unit);
  return {GuestOffset(begin), end > begin ? end - begin : 0};
}

Result<> Disk::finish(Result<> change) {
  if (change && write_through_) return do_flush();
  return change;
}

Result<> Disk::read(GuestOffset offset, Bytes out) {
  IMG_TRY(check_range(offset, out.size()));
  if (out.empty()) return {};
  return do_read(offset, out);
}

Result<> Disk::write(GuestOffset offset, ConstBytes data) {
  IMG_TRY(check_range(offset, data.size()));
  if (data.empty()) return {};
  return finish(detect_unit_ == 0 ? do_write(offset, data) : write_detecting(offset, data));
}

void Disk::set_detect_zeroes(DetectZeroes mode) {
  const DiskInfo disk = do_info();
  if (mode == DetectZeroes::off || disk.read_only) return;
  constexpr uint32_t kWorthLooking = 4096;
  detect_unit_ = std::max(disk.subcluster_size != 0 ? disk.subcluster_size : disk.cluster_size, kWorthLooking);
  detected_ = mode == DetectZeroes::unmap ? Zeroing::may_free : Zeroing::keep_allocation;
}

/// Units, or parts of them at either end, that are zeros go another way than others, neighbours together.
Result<> Disk::write_detecting(GuestOffset offset, ConstBytes data) {
  while (!data.empty()) {
    size_t length = std::min<size_t>(data.size(), detect_unit_ - offset.bytes() % detect_unit_);
    const bool zero = is_zero(data.first(length));
    while (length < data.size()) {
      const ConstBytes next = data.subspan(length, std::min<size_t>(data.size() - length, detect_unit_));
      if (is_zero(next) != zero) break;
      length += next.size();
    }
    IMG_TRY(zero ? do_write_zeroes({offset, length}, detected_) : do_write(offset, data.first(length)));
    offset = offset + length;
    data = data.subspan(length);
  }
  return {};
}

Result<> Disk::write_zeroes(GuestRange range, Zeroing zeroing) {
  IMG_TRY(check_range(range.begin, range.length));
  IMG_TRY(check_writable());
  if (range.empty()) return {};
  return finish(do_write_zeroes(range, zeroing));
}

Result<> Disk::discard(GuestRange range) {
  IMG_TRY(check_range(range.begin, range.length));
  IMG_TRY(check_writable());
  const DiskInfo disk = do_info();
  const GuestRange units = whole_units(range, disk.subcluster_size != 0 ? disk.subcluster_size : disk.cluster_size);
  return units.empty() ? Result<>{} : finish(do_write_zeroes(units, Zeroing::may_free));
}

Result<> Disk::forget(GuestRange range) {
  IMG_TRY(check_range(range.begin, range.length));
  IMG_TRY(check_writable());
  const GuestRange clusters = whole_units(range, do_info().cluster_size);
  return clusters.empty() ? Result<>{} : finish(do_forget(clusters));
}

Result<> Disk::do_forget(GuestRange) {
  const DiskInfo disk = do_info();
  return fail(ErrorCode::unsupported, "{} is {}, which has no layer below it", disk.name, disk.format);
}

Result<> Disk::populate(GuestRange range, Holes holes) {
  IMG_TRY(check_range(range.begin, range.length));
  IMG_TRY(check_writable());
  if (range.empty()) return {};
  return finish(do_populate(range, holes));
}

Result<std::vector<Extent>> Disk::map(GuestRange range, size_t max_extents) {
  IMG_TRY(check_range(range.begin, range.length));
  if (range.empty()) return std::vector<Extent>{};
  return do_map(range, max_extents);
}

Result<> Disk::flush() { return do_flush(); }

Result<> Disk::resize(uint64_t size, ResizeOptions options) {
  IMG_TRY(check_writable());
  if (size < this->size() && !options.shrink)
    return fail(ErrorCode::unsupported,
                "shrinking from {} to {} bytes loses what lies behind the new end; it has to be asked for",
                this->size(), size);
  return finish(do_resize(size, options));
}

Result<> Disk::close() { return do_close(); }

}  // namespace imgfuse
