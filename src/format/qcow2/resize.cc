// Growing and shrinking the virtual disk.
#include <algorithm>
#include <limits>

#include "base/buffer.h"
#include "base/endian.h"
#include "core/pieces.h"
#include "format/qcow2/qcow2_disk.h"

namespace imgfuse::qcow2 {

Result<> Qcow2Disk::do_resize(uint64_t size, ResizeOptions options) {
  const Geometry& g = image_.geometry;
  const uint64_t old_size = do_size();
  if (size % 512 != 0) return fail(ErrorCode::invalid, "size {} is not a multiple of 512", size);
  if (size > max_virtual_size(g.cluster_bits, g.l2.extended))
    return fail(ErrorCode::invalid, "size {} is past the largest disk of this cluster size, {}", size,
                max_virtual_size(g.cluster_bits, g.l2.extended));
  const auto lease = ranges_.exclusive({GuestOffset(0), std::numeric_limits<uint64_t>::max()});
  IMG_TRY(latch_.check());
  if (g.l2.data_file && size > kMaxHostOffset)
    return fail(ErrorCode::invalid, "size {} is too large: offsets in a data file end at 2^56", size);
  if (size == old_size) return {};
  if (header_.version < 3 && header_.snapshot_count > 0)
    return fail(ErrorCode::unsupported, "a version 2 image with snapshots cannot be resized");
  const Strict strict(*this);
  IMG_TRY(write_out());
  if (size < old_size) return note(shrink(size));
  if (g.l2.data_file) IMG_TRY(data_->resize(size));
  Result<> grown = note(grow(old_size, size, options.preallocation));
  if (!grown && g.l2.data_file && do_size() == old_size) (void)data_->resize(old_size);
  return grown;
}

Result<> Qcow2Disk::grow(uint64_t old_size, uint64_t size, Preallocation preallocation) {
  const Geometry& g = image_.geometry;
  if (const uint64_t needed = divide_up(size, g.l2_coverage); needed > map_.l1_entries()) IMG_TRY(grow_l1(needed));
  // What lies behind the old end must read as zeros: old content of the last cluster, a longer backing file, what a
  // growth left that did not succeed, or half of a virtual machine state that was never saved.
  const uint64_t dirty_end =
      round_up(std::min(size, std::max(map_.tables_end().bytes(), backing_size_)), g.cluster_size);
  if (dirty_end > old_size) IMG_TRY(zero_range({GuestOffset(old_size), dirty_end - old_size}, Zeroing::may_free));
  if (raw_data_) {
    const uint64_t first = round_up(old_size, g.cluster_size);
    IMG_TRY(link_raw_data({GuestOffset(first), round_up(size, g.cluster_size) - first}));
  }
  IMG_TRY(flusher_.flush());
  IMG_TRY(write_size(size));
  if (preallocation == Preallocation::off) return {};
  const GuestRange added{GuestOffset(old_size), size - old_size};
  IMG_TRY(preallocation == Preallocation::full ? fill_with_zeroes(added) : populate_range(added));
  return flusher_.flush();
}

/// Every byte is written.
Result<> Qcow2Disk::fill_with_zeroes(GuestRange range) {
  while (!range.empty()) {
    const uint64_t piece = std::min<uint64_t>(range.length, kZeroesSize);
    IMG_TRY(write_runs(range.begin, zeroes(piece)));
    range = {range.begin + piece, range.length - piece};
  }
  return {};
}

/// The size first. A crash behind it leaves clusters that lie past the disk's end, which are counted, and which growing
/// clears.
Result<> Qcow2Disk::shrink(uint64_t size) {
  const Geometry& g = image_.geometry;
  IMG_TRY(flusher_.flush());
  IMG_TRY(write_size(size));
  const GuestOffset end(round_up(size, g.cluster_size));
  const GuestOffset tables_end = map_.tables_end();
  if (end < tables_end) IMG_TRY(forget_clusters({end, tables_end - end}));
  map_.drop_tables_from(divide_up(size, g.l2_coverage));
  IMG_TRY(write_out());
  for (bool dropped = true; dropped;) {
    IMG_LET(dropped, allocator_.drop_empty_blocks());
    IMG_TRY(write_out());
  }
  IMG_TRY(allocator_.cut_end());
  if (!g.l2.data_file) return {};
  IMG_TRY(data_->resize(size));
  return data_->flush();
}

/// New table, counts and content durable, then the header switches, then the old one is freed (I7).
Result<> Qcow2Disk::grow_l1(uint64_t entries) {
  const Geometry& g = image_.geometry;
  IMG_LET(std::vector<Reservation> table, allocator_.reserve_contiguous(g.clusters_for(entries * 8)));
  const HostOffset offset = table.front().host();
  IMG_TRY(storage_->write(offset, map_.encode_l1(entries)));
  IMG_TRY(flusher_.flush());

  struct {
    be<uint32_t> entries;
    be<uint64_t> offset;
  } field{static_cast<uint32_t>(entries), offset.bytes()};
  Result<> switched = image_.header_writer.write(kSizeField + 12, std::as_bytes(std::span(&field, 1)));
  if (switched) switched = storage_->flush();
  if (!switched) {
    latch_.set(switched.error());  // either table may be the durable one
    for (Reservation& part : table) part.commit();
    return switched;
  }
  map_.adopt_l1(offset, entries);
  for (Reservation& part : table) part.commit();
  return {};
}

Result<> Qcow2Disk::write_size(uint64_t size) {
  const be<uint64_t> field(size);
  Result<> written = image_.header_writer.write(kSizeField, std::as_bytes(std::span(&field, 1)));
  if (written) written = storage_->flush();
  if (!written) {
    latch_.set(written.error());
    return written;
  }
  size_ = size;
  bitmaps_.resize(size);
  return {};
}

}  // namespace imgfuse::qcow2
