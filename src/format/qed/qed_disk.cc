#include "format/qed/qed_disk.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <limits>

#include "core/extent_list.h"

namespace imgfuse::qed {
namespace {

/// How long nothing has to have changed before the image is marked as clean.
constexpr std::chrono::seconds kIdle{5};

constexpr GuestRange kEverything{GuestOffset(0), std::numeric_limits<uint64_t>::max()};

}  // namespace

QedDisk::QedDisk(std::shared_ptr<Storage> storage, Header header, const OpenParameters& parameters)
    : storage_(std::move(storage)),
      read_only_(parameters.read_only),
      size_(header.image_size),
      image_(*storage_, header, parameters.metadata_cache),
      allocator_(image_),
      map_(image_, allocator_),
      need_check_(*storage_, std::move(header), latch_),
      flusher_(*storage_, *this, TableCache::kStages, latch_),
      idle_timer_(*parameters.clock, kIdle, [this] { idle(); }) {}

QedDisk::~QedDisk() { assert(closed_ && "a writable disk must be closed"); }

Result<> QedDisk::start(const BackingOpener& open_backing) {
  IMG_LET(const HostOffset end, end_of_file(*storage_, image_.header.cluster_size));
  allocator_.start(end);
  IMG_TRY(map_.load(!read_only_));
  if (const auto& name = image_.header.backing_name) {
    if (!open_backing) return fail(ErrorCode::invalid, "no way to open the backing file {}", *name);
    IMG_LET(backing_, open_backing(*name, image_.header.backing_format()));
    if (backing_) backing_size_ = backing_->size();
  }
  if (read_only_) return {};
  image_.tables.set_make_room([this] { (void)flusher_.flush(); });  // an error stays in the latch
  closed_ = false;
  return {};
}

DiskInfo QedDisk::do_info() const {
  return {.name = storage_->info().name,
          .format = "qed",
          .size = do_size(),
          .cluster_size = static_cast<uint32_t>(image_.geometry.cluster_size),
          .read_only = read_only_};
}

// ---- Reading

Result<> QedDisk::do_read(GuestOffset offset, Bytes out) {
  const auto lease = ranges_.shared({offset, out.size()});
  return note(read_range(offset, out));
}

Result<> QedDisk::read_range(GuestOffset offset, Bytes out) {
  while (!out.empty()) {
    IMG_LET(const Mapping run, map_.lookup({offset, out.size()}));
    const Bytes part = out.first(run.length);
    switch (run.kind) {
      case ClusterKind::data:
        IMG_TRY(storage_->read(run.host, part));
        break;
      case ClusterKind::zero:
        std::memset(part.data(), 0, part.size());
        break;
      case ClusterKind::unallocated:
        IMG_TRY(read_below(backing_.get(), backing_size_, offset, part));
        break;
    }
    offset = offset + run.length;
    out = out.subspan(run.length);
  }
  return {};
}

bool QedDisk::reads_zero(const Mapping& mapping, GuestRange range) const {
  return mapping.kind == ClusterKind::zero ||
         (mapping.kind == ClusterKind::unallocated && range.begin.bytes() >= backing_size_);
}

// ---- Map

/// No lease: the answer may be out of date when it arrives in any case, and nothing is read but tables.
Result<std::vector<Extent>> QedDisk::do_map(GuestRange range, size_t max_extents) {
  ExtentList extents(max_extents);
  while (!range.empty() && extents.wants_more()) {
    IMG_LET(const Mapping run, map_.lookup(range));
    GuestRange part{range.begin, run.length};
    if (run.kind == ClusterKind::unallocated && part.begin.bytes() < backing_size_) {
      part.length = std::min(part.length, backing_size_ - part.begin.bytes());
      IMG_LET(part.length, extents.append_below(*backing_, part));
    } else {
      const bool data = run.kind == ClusterKind::data;
      extents.append({.range = part,
                      .kind = data                            ? ExtentKind::data
                              : run.kind == ClusterKind::zero ? ExtentKind::zero
                                                              : ExtentKind::hole,
                      .allocated = data,
                      .has_host_offset = data,
                      .host = run.host});
    }
    range = {range.begin + part.length, range.length - part.length};
  }
  return extents.take();
}

DiskStatistics QedDisk::statistics() const {
  DiskStatistics statistics;
  image_.tables.add_to(statistics);
  statistics.flush_cycles = flusher_.cycles();
  return statistics;
}

Result<> QedDisk::do_count_allocated(const std::atomic<bool>& stop) {
  for (bool more = true; more && !stop.load(std::memory_order_relaxed);) {
    IMG_LET(more, map_.count_next(do_size()));
  }
  return {};
}

// ---- Flushing

Result<> QedDisk::do_flush() { return read_only_ ? Result<>{} : flusher_.flush(); }

void QedDisk::cut() {
  ExclusiveLock lock(image_.mutex);
  cycle_.slices = image_.tables.freeze(kMapStage);
  cycle_.l1 = map_.freeze_l1();
}

/// New tables are complete, as zeros, when the first barrier is done, so L1 entries need no stage of their own (I3).
Result<bool> QedDisk::write_stage(unsigned stage) {
  if (stage != kMapStage) return false;
  IMG_TRY(image_.tables.write(cycle_.slices));
  IMG_TRY(map_.write_l1(cycle_.l1));
  return !cycle_.slices.empty() || !cycle_.l1.empty();
}

void QedDisk::end_cycle(bool durable) {
  image_.tables.thaw(cycle_.slices, durable);
  if (!durable) map_.keep_l1(cycle_.l1);
  cycle_ = {};
}

/// Asks for a flush cycle when too much is dirty. Called without a lease.
Result<> QedDisk::relieve() { return image_.tables.wants_flush() ? flusher_.flush() : Result<>{}; }

/// Nothing has changed for a while: after a flush the image needs no check any more. Nobody waits for that flush; what
/// comes in the meantime makes it a vain one. What is still on its way is waited for, or it would miss the flush.
void QedDisk::idle() {
  uint64_t changes = 0;
  {
    const auto lease = ranges_.exclusive(kEverything);
    changes = need_check_.changes();
  }
  if (!flusher_.flush()) return;
  {
    const auto lease = ranges_.exclusive(kEverything);
    if (!need_check_.is_set() || need_check_.changes() != changes || !latch_.check()) return;
    if (!need_check_.clear()) return;
  }
  if (Result<> flushed = storage_->flush(); !flushed) latch_.set(flushed.error());
}

// ---- Closing

/// Nothing is dirty when it returns, if nobody makes requests meanwhile.
Result<> QedDisk::write_out() {
  IMG_TRY(flusher_.flush());
  IMG_LET(const bool trimmed, allocator_.trim());
  if (!need_check_.is_set()) return trimmed ? storage_->flush() : Result<>{};
  IMG_TRY(need_check_.clear());
  return storage_->flush();
}

Result<> QedDisk::do_close() {
  idle_timer_.stop();
  Result<> result = closed_ ? Result<>{} : write_out();
  closed_ = true;
  if (backing_)
    if (Result<> below = backing_->close(); result && !below) result = std::move(below);
  backing_.reset();
  storage_.reset();  // and with it the image's locks
  return result;
}

// ---- Doors

namespace {

Result<> check_if_needed(Storage& storage, Header& header) {
  if ((header.features & kNeedCheck) == 0) return {};
  IMG_LET(const CheckReport report, check(storage, Repair::all, {}));
  if (report.corruptions > 0 || report.check_errors > 0)
    return fail(ErrorCode::corrupt,
                "the image was not closed cleanly and {} damaged entries could not be repaired; it can be opened "
                "read-only",
                report.corruptions + report.check_errors);
  header.features &= ~kNeedCheck;
  return {};
}

}  // namespace

Result<std::unique_ptr<Disk>> open(std::shared_ptr<Storage> storage, OpenParameters parameters) {
  IMG_LET(Header header, read_header(*storage));
  if (!parameters.read_only) {
    if (!storage->info().extensible)
      return fail(ErrorCode::unsupported, "a QED image on a device of fixed size can only be read");
    IMG_TRY(clear_autoclear_features(*storage, header));
    IMG_TRY(check_if_needed(*storage, header));
  }
  auto disk = std::make_unique<QedDisk>(std::move(storage), std::move(header), parameters);
  IMG_TRY(disk->start(parameters.open_backing));
  return disk;
}

}  // namespace imgfuse::qed
