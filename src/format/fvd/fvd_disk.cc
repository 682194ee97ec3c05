#include "format/fvd/fvd_disk.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <limits>

#include "base/buffer.h"
#include "base/log.h"
#include "core/extent_list.h"
#include "format/fvd/journal.h"

namespace imgfuse::fvd {
namespace {

/// Data; journal or table; bitmap; an empty journal; "clean".
constexpr unsigned kStages = 5;

std::optional<std::string> non_empty(const std::string& text) {
  return text.empty() ? std::nullopt : std::optional(text);
}

}  // namespace

FvdDisk::FvdDisk(std::shared_ptr<Storage> storage, std::shared_ptr<Storage> data, const Header& header,
                 OpenParameters parameters)
    : storage_(std::move(storage)),
      data_(std::move(data)),
      name_(storage_->info().name),
      read_only_(parameters.read_only),
      header_(header),
      size_(header.virtual_size),
      map_(header),
      chunks_(*data_, header, std::move(parameters.grow_device)),
      flusher_(*storage_, *this, kStages, latch_),
      keeps_base_(parameters.keeps_base),
      journal_sectors_(header.journal_sectors()),
      clean_on_disk_(header.clean_shutdown) {}

FvdDisk::~FvdDisk() { assert(closed_ && "a writable disk must be closed"); }

Result<> FvdDisk::start(const BackingOpener& open_backing) {
  IMG_TRY(map_.load(*storage_));
  const bool recover = !header_.clean_shutdown && journal_sectors_ > 0;
  if (recover) IMG_TRY(map_.replay(*storage_));
  const bool keeps_metadata = header_.compact || header_.uses_base();
  if (!read_only_ && !header_.clean_shutdown && !recover && keeps_metadata)
    return fail(ErrorCode::corrupt,
                "the image was not closed cleanly and has no journal: its last changes may be lost; it can be opened "
                "read-only, and imgfuse check --repair all takes it as it is");
  IMG_LET(const uint64_t data_end, data_->size());
  const TableSurvey found = survey(map_.table(), kMostLeaks);
  IMG_TRY(check_reach(header_, found.next));
  if (found.duplicate)
    return fail(ErrorCode::corrupt, "two entries of the table claim chunk {}; imgfuse check tells which",
                *found.duplicate);
  if (!read_only_ && found.next > 0 && header_.data_start() + (found.next - 1) * header_.chunk_size >= data_end)
    return fail(ErrorCode::corrupt,
                "the table claims chunk {}, past the end of the data ({:#x}); the image can be opened read-only",
                found.next - 1, data_end);
  if (header_.uses_base()) {
    if (!open_backing) return fail(ErrorCode::invalid, "no way to open the base image {}", header_.base_name);
    IMG_LET(base_, open_backing(header_.base_name, non_empty(header_.base_format)));
    if (base_) base_length_ = base_->size();
  }
  if (read_only_) return {};
  if (header_.need_zero_init && !data_->info().extensible)
    log_warning("{} wants its data on storage that reads as zeros where nothing was written; a device may not", name_);
  if (header_.compact) IMG_TRY(chunks_.start(found));
  closed_ = false;
  if (recover)
    if (Result<> recovered = checkpoint(); !recovered) {
      closed_ = true;
      return recovered;
    }
  return {};
}

/// A data file without a table and without a base, which has each byte at its own offset and needs no metadata.
int FvdDisk::share_host_file() {
  if (header_.compact || header_.uses_base() || header_.data_start() != 0) return -1;
  if (!read_only_ && !ensure_length(do_size())) return -1;
  return data_->size() == do_size() ? data_->share_file() : -1;
}

DiskInfo FvdDisk::do_info() const {
  const uint64_t block = header_.block_size != 0 && header_.uses_base() ? header_.block_size : kPage;
  const bool whole_chunks = header_.compact && header_.chunk_size <= std::numeric_limits<uint32_t>::max();
  return {.name = name_,
          .format = "fvd",
          .size = do_size(),
          .cluster_size = static_cast<uint32_t>(whole_chunks ? header_.chunk_size : block),
          .read_only = read_only_,
          .subcluster_size = static_cast<uint32_t>(header_.uses_base() ? block : kSector),
          .leaves_backing_when_full = header_.uses_base()};
}

// ---- Reading

Result<> FvdDisk::do_read(GuestOffset offset, Bytes out) {
  const auto lease = ranges_.shared({offset, out.size()});
  return read_range(offset, out);
}

Result<> FvdDisk::read_range(GuestOffset offset, Bytes out) {
  while (!out.empty()) {
    const Run run = map_.lookup({offset, out.size()});
    const Bytes part = out.first(run.length);
    switch (run.kind) {
      case RunKind::image:
        IMG_TRY(data_->read(run.host, part));
        break;
      case RunKind::base:
        IMG_TRY(read_base(offset, part));
        break;
      case RunKind::zero:
        std::memset(part.data(), 0, part.size());
        break;
    }
    offset = offset + run.length;
    out = out.subspan(run.length);
  }
  return {};
}

/// The base may be shorter than it was.
Result<> FvdDisk::read_base(GuestOffset offset, Bytes out) {
  return read_below(base_.get(), base_length_, offset, out);
}

// ---- Map

Result<std::vector<Extent>> FvdDisk::do_map(GuestRange range, size_t max_extents) {
  ExtentList extents(max_extents);
  while (!range.empty() && extents.wants_more()) {
    const Run run = map_.lookup(range);
    GuestRange part{range.begin, run.length};
    Extent extent{.range = part};
    if (run.kind == RunKind::image) {
      // Much of a chunk may never have been written.
      IMG_LET(const StorageExtent piece, data_->extent({run.host, run.length}));
      part.length = extent.range.length = piece.length;
      extent.kind = piece.data ? ExtentKind::data : ExtentKind::zero;
      extent.allocated = piece.data || header_.compact;  // a chunk has its place
      extent.has_host_offset = true;
      extent.host = run.host;
    } else if (run.kind == RunKind::zero) {
      if (run.over_base) extent.kind = ExtentKind::zero;
    } else if (part.begin.bytes() < base_length_) {
      part.length = std::min(part.length, base_length_ - part.begin.bytes());
      IMG_LET(const uint64_t covered, extents.append_below(*base_, part));
      range = {range.begin + covered, range.length - covered};
      continue;
    } else if (base_) {  // it is shorter than it was
      extent.kind = ExtentKind::zero;
      extent.depth = 1;
    }
    extents.append(extent);
    range = {range.begin + part.length, range.length - part.length};
  }
  return extents.take();
}

// ---- Flushing and closing

Result<> FvdDisk::do_flush() {
  if (read_only_) return {};
  return flusher_.flush();
}

/// Asks for a flush cycle when too much is not durable. Called without a lease.
Result<> FvdDisk::relieve() {
  if (map_.wants_checkpoint(with_base())) checkpoint_wanted_ = true;
  // Later ones then flush each file once. With data in the image the header comes with them.
  const bool header_first = data_ != storage_ && clean_on_disk_ && journal_sectors_ > 0 && map_.has_hard();
  if (checkpoint_wanted_ || header_first || map_.wants_flush()) return flusher_.flush();
  return {};
}

void FvdDisk::cut() {
  cycle_.clean = clean_wanted_.exchange(false);
  const bool checkpoint = checkpoint_wanted_.exchange(false) || cycle_.clean;
  cycle_.map = map_.cut(journal_sectors_ - journal_next_, checkpoint, with_base());
}

/// The journal begins with nothing that could be taken for a record of this time, and is looked at from now on.
Result<> FvdDisk::mark_dirty() {
  IMG_TRY(zero_journal());
  clean_on_disk_ = false;
  return write_field<uint32_t>(*storage_, kCleanField, 0);
}

Result<> FvdDisk::zero_journal() {
  const uint64_t used = journal_is_zero_ ? journal_next_ : journal_sectors_.load();
  IMG_TRY(clear_journal(*storage_, HostOffset(header_.journal_offset), used));
  journal_next_ = 0;
  journal_is_zero_ = true;
  return {};
}

Result<bool> FvdDisk::write_stage(unsigned stage) {
  const MapCut& map = cycle_.map;
  switch (stage) {
    case 0: {
      cycle_.marks = map.has_changes() && journal_sectors_ > 0 && clean_on_disk_;
      if (cycle_.marks) IMG_TRY(mark_dirty());
      if (data_ == storage_) return true;
      IMG_TRY(data_->flush());
      return cycle_.marks;
    }
    case 1:
      if (!map.journal.empty()) {
        IMG_TRY(storage_->write(HostOffset(header_.journal_offset + journal_next_ * kSector), map.journal));
        journal_next_ += map.journal.size() / kSector;
        return true;
      }
      for (const PageCopy& page : map.table) IMG_TRY(storage_->write(page.where, page.bytes));
      return !map.table.empty();
    case 2:  // after the table: a block that is in the image must not read as zeros for want of its chunk
      for (const PageCopy& page : map.bitmap) IMG_TRY(storage_->write(page.where, page.bytes));
      return !map.bitmap.empty();
    case 3: {
      const bool empty_journal = map.checkpoint && !clean_on_disk_ && (journal_next_ > 0 || !journal_is_zero_);
      if (map.complete) IMG_TRY(write_field<uint32_t>(*storage_, kAllDataField, 1));
      if (empty_journal) IMG_TRY(zero_journal());
      return map.complete || empty_journal;
    }
    default:
      if (!cycle_.clean || clean_on_disk_) return false;
      IMG_TRY(write_field<uint32_t>(*storage_, kCleanField, 1));
      clean_on_disk_ = true;
      return true;
  }
}

/// Data in a file of their own are flushed there.
bool FvdDisk::needs_barrier(unsigned stage) const { return stage > 0 || data_ == storage_ || cycle_.marks; }

void FvdDisk::end_cycle(bool durable) {
  if (durable && cycle_.map.complete) map_.set_base_left(true);
  cycle_ = {};
}

Result<> FvdDisk::checkpoint() {
  clean_wanted_ = true;
  return flusher_.flush();
}

Result<> FvdDisk::do_close() {
  Result<> result;
  if (!closed_) result = checkpoint();
  closed_ = true;
  if (base_)
    if (Result<> below = base_->close(); result && !below) result = std::move(below);
  base_.reset();
  data_.reset();
  storage_.reset();  // and with it the image's locks
  return result;
}

// ---- Doors

Result<std::unique_ptr<Disk>> open(std::shared_ptr<Storage> storage, OpenParameters parameters) {
  IMG_LET(const Header header, read_header(*storage));
  std::shared_ptr<Storage> data = storage;
  if (!header.data_name.empty()) {
    if (!parameters.open_data_file)
      return fail(ErrorCode::invalid, "no way to open the data file {}", header.data_name);
    IMG_LET(data, parameters.open_data_file(header.data_name));
    if (parameters.open_data_format) {
      IMG_LET(data, parameters.open_data_format(std::move(data), non_empty(header.data_format)));
    }
  }
  const BackingOpener open_backing = parameters.open_backing;
  auto disk = std::make_unique<FvdDisk>(std::move(storage), std::move(data), header, std::move(parameters));
  IMG_TRY(disk->start(open_backing));
  return disk;
}

}  // namespace imgfuse::fvd
