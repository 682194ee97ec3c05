// Growing and shrinking the virtual disk. All of it happens on a clean image with an empty journal, under a lease on
// the whole disk, step by step, each durable before the next.
#include <algorithm>
#include <limits>

#include "base/buffer.h"
#include "core/host_space.h"
#include "format/fvd/fvd_disk.h"
#include "format/fvd/journal.h"

namespace imgfuse::fvd {
namespace {

constexpr uint64_t kMaxDisk = uint64_t{1} << 62;

}  // namespace

Result<> FvdDisk::do_resize(uint64_t size, ResizeOptions options) {
  if (size % kSector != 0) return fail(ErrorCode::invalid, "size {} is not a multiple of 512", size);
  if (size >= kMaxDisk) return fail(ErrorCode::invalid, "size {} is past the largest disk, {}", size, kMaxDisk);
  const auto lease = ranges_.exclusive({GuestOffset(0), std::numeric_limits<uint64_t>::max()});
  IMG_TRY(latch_.check());
  const uint64_t old_size = do_size();
  if (size == old_size) return {};
  IMG_TRY(checkpoint());
  return size < old_size ? shrink(size) : grow(old_size, size, options.preallocation);
}

/// A failure leaves nobody knowing what the header says.
Result<> FvdDisk::change_header(const std::function<Result<>()>& write) {
  Result<> changed = write();
  if (changed) changed = storage_->flush();
  if (!changed) latch_.set(changed.error());
  return changed;
}

/// What the last chunk, or an image that is not compact, holds behind the new end is cleared when the disk grows again.
Result<> FvdDisk::shrink(uint64_t size) {
  IMG_TRY(change_header([&] { return write_field<uint64_t>(*storage_, kSizeField, size); }));
  const uint64_t before = header_.chunks();
  Header smaller = header_;
  smaller.virtual_size = size;
  std::vector<uint32_t> freed;
  if (header_.compact)
    freed.assign(map_.table().begin() + static_cast<ptrdiff_t>(smaller.chunks()), map_.table().end());
  std::erase(freed, kEmpty);
  map_.resize(smaller);
  header_.virtual_size = size;
  size_ = size;
  // Other programs show the entries behind the end again when they make the disk longer.
  if (!freed.empty()) IMG_TRY(change_header([&] { return clear_entries(header_.chunks(), before); }));
  chunks_.give_back(freed);
  return {};
}

Result<> FvdDisk::grow(uint64_t old_size, uint64_t size, Preallocation preallocation) {
  Header larger = header_;
  larger.virtual_size = size;
  if (header_.uses_base() && header_.base_size > old_size) {  // the base must not show behind the old end
    larger.base_size = old_size;
    IMG_TRY(change_header([&] { return write_field<uint64_t>(*storage_, kBaseSizeField, old_size); }));
    header_.base_size = old_size;
  }
  if (header_.compact) IMG_TRY(make_table_room(larger));
  larger.journal_offset = header_.journal_offset;
  larger.journal_size = header_.journal_size;
  IMG_TRY(zero_behind(old_size, size));
  if (header_.compact) IMG_TRY(clear_entries(header_.chunks(), larger.chunks()));
  IMG_TRY(flusher_.flush());
  IMG_TRY(change_header([&] { return write_field<uint64_t>(*storage_, kSizeField, size); }));
  map_.resize(larger);
  header_.virtual_size = size;
  size_ = size;
  if (preallocation == Preallocation::off || preallocation == Preallocation::metadata) return {};
  IMG_TRY(preallocate_range({GuestOffset(old_size), size - old_size}, preallocation));
  return flusher_.flush();
}

/// Old content behind the old end: of the last chunk, or of a disk that was longer once.
Result<> FvdDisk::zero_behind(uint64_t old_size, uint64_t size) {
  if (header_.compact) {
    const uint64_t end = std::min(round_up(old_size, header_.chunk_size), size);
    if (end == old_size) return {};
    const Run last = map_.place({GuestOffset(old_size), end - old_size});
    return last.kind == RunKind::image ? zero_and_free(*data_, {last.host, last.length}) : Result<>{};
  }
  IMG_LET(const uint64_t length, data_->size());
  const uint64_t begin = header_.data_start() + old_size;
  const uint64_t end = header_.data_start() + size;
  if (begin < length) IMG_TRY(zero_and_free(*data_, {HostOffset(begin), std::min(end, length) - begin}));
  if (length >= end) return {};
  if (!data_->info().extensible)
    return fail(ErrorCode::no_space, "the device has {} bytes, and the disk needs {}", length, end);
  return data_->resize(end);
}

Result<> FvdDisk::clear_entries(uint64_t first, uint64_t end) {
  const std::vector<std::byte> empty(std::min<uint64_t>((end - first) * 4, 1 << 20), std::byte{0xff});
  for (uint64_t at = first * 4; at < end * 4;) {
    const uint64_t piece = std::min<uint64_t>(end * 4 - at, empty.size());
    IMG_TRY(storage_->write(HostOffset(header_.table_offset + at), ConstBytes(empty).first(piece)));
    at += piece;
  }
  return {};
}

/// A table that has no room left takes it from the front of the journal, which lies behind it and is empty.
Result<> FvdDisk::make_table_room(const Header& wanted) {
  if (wanted.chunks() > uint64_t{kMaxChunk} + 1 || wanted.table_bytes() > kMaxTable)
    return fail(ErrorCode::unsupported, "a disk of {} bytes needs more chunks than a table can have",
                wanted.virtual_size);
  const uint64_t room = header_.table_room();
  if (wanted.table_bytes() <= room) return {};
  const auto none = [&] {
    return fail(ErrorCode::unsupported,
                "the table has room for {} chunks of {} bytes, and {} are needed; copy the disk into a longer image "
                "with imgfuse convert",
                room / 4, header_.chunk_size, wanted.chunks());
  };
  const uint64_t table_end = round_up(wanted.table_offset + wanted.table_bytes(), kPage);
  const uint64_t journal_end = header_.journal_offset + header_.journal_size;
  const uint64_t needed = divide_up(wanted.chunks(), kEntriesBesideBitmap) * kSector;
  if (header_.journal_sectors() == 0 || header_.journal_offset != header_.table_offset + room ||
      table_end + round_up(needed, kPage) > journal_end)
    return none();
  struct {
    le<uint64_t> offset;
    le<uint64_t> size;
  } const fields{table_end, journal_end - table_end};
  IMG_TRY(change_header([&] { return storage_->write(kJournalFields, std::as_bytes(std::span(&fields, 1))); }));
  header_.journal_offset = table_end;
  header_.journal_size = journal_end - table_end;
  journal_sectors_ = header_.journal_sectors();
  return {};
}

Result<> FvdDisk::preallocate_range(GuestRange range, Preallocation mode) {
  if (!header_.compact)
    return preallocate(*data_, {HostOffset(header_.data_start() + range.begin.bytes()), range.length}, mode);
  IMG_TRY(populate_piece(range, Holes::fill));
  while (mode == Preallocation::full && !range.empty()) {
    const Run run = map_.place(range);
    IMG_TRY(preallocate(*data_, {run.host, run.length}, mode));
    range = {range.begin + run.length, range.length - run.length};
  }
  return {};
}

}  // namespace imgfuse::fvd
