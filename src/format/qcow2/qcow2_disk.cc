#include "format/qcow2/qcow2_disk.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "base/buffer.h"
#include "base/endian.h"
#include "base/log.h"
#include "core/extent_list.h"
#include "format/qcow2/data_file.h"

namespace imgfuse::qcow2 {
namespace {

/// What is inflated ahead of need takes half of the cache at most.
uint64_t window_ahead(const Image& image) {
  if (!image.inflated.keeps(2 * InflatePool::kReaders * image.geometry.cluster_size)) return 0;
  return image.inflated.cache()->capacity() / (2 * InflatePool::kReaders);
}

}  // namespace

Qcow2Disk::Qcow2Disk(std::shared_ptr<Storage> storage, Header header, OpenParameters parameters)
    : storage_(std::move(storage)),
      data_(storage_),
      header_(std::move(header)),
      raw_data_(header_.has_raw_data_file()),
      read_only_(parameters.read_only),
      compress_(parameters.compress.has_value() && !read_only_),
      lazy_(!read_only_ && header_.version >= 3 && (header_.compatible & kLazyRefcounts) != 0),
      size_(header_.size),
      hold_(std::move(parameters.hold)),
      image_(*storage_, header_, parameters.metadata_cache, std::move(parameters.compressed_cache)),
      refcounts_(image_),
      allocator_(image_, refcounts_, latch_),
      bitmaps_(image_, allocator_, ranges_, latch_, read_only_),
      packer_(image_, refcounts_, allocator_),
      map_(image_, allocator_),
      flusher_(*storage_, *this, TableCache::kStages, latch_),
      snapshots_(hold_ || parameters.snapshot ? nullptr : std::make_unique<Qcow2Snapshots>(*this)),
      inflaters_({.cluster_size = image_.geometry.cluster_size, .window = window_ahead(image_)},
                 [this](GuestOffset guest) { inflate_ahead(guest); }) {}

Qcow2Disk::~Qcow2Disk() { assert(closed_ && "a writable disk must be closed"); }

Result<> Qcow2Disk::start(const BackingOpener& open_backing, const DataFileOpener& open_data_file) {
  {
    ExclusiveLock lock(image_.mutex);
    image_.known.add(0);
    if (header_.snapshot_count > 0) image_.known.add(image_.geometry.cluster_of(header_.snapshots_offset));
  }
  if (!read_only_) IMG_TRY(refcounts_.load(header_));
  IMG_TRY(map_.load(header_, !read_only_));
  if (header_.has_data_file()) IMG_TRY(open_data(open_data_file));
  if (snapshots_) snapshots_->load();
  if (header_.backing_name) {
    if (!open_backing) return fail(ErrorCode::invalid, "no way to open the backing file {}", *header_.backing_name);
    IMG_LET(backing_, open_backing(*header_.backing_name, header_.backing_format));
    if (backing_) backing_size_ = backing_->size();
  }
  if (snapshots_) IMG_TRY(bitmaps_.load(header_));
  if (read_only_) return {};
  IMG_LET(const uint64_t file_size, storage_->size());
  allocator_.start(file_size);
  if (!compress_ && !image_.geometry.l2.data_file) allocator_.stay_ahead();
  image_.tables.set_make_room([this] { (void)flush_counts(); });  // an error stays in the latch
  IMG_TRY(clear_autoclear_bits());
  IMG_TRY(bitmaps_.mark_in_use());
  closed_ = false;
  return {};
}

Result<> Qcow2Disk::open_data(const DataFileOpener& open_data_file) {
  if (!open_data_file) return fail(ErrorCode::invalid, "no way to open the data file");
  IMG_LET(std::shared_ptr<Storage> file, open_data_file(header_.data_file));
  IMG_LET(data_, DataFile::open(std::move(file), do_size()));
  return {};
}

/// Metadata that cannot be was met: whatever is written from here on could make it worse. The image says so, and is
/// only read until it is repaired.
Result<> Qcow2Disk::mark_corrupt() {
  if (image_.geometry.version < 3) return {};
  IMG_TRY(image_.header_writer.set(kCorrupt));
  return storage_->flush();
}

/// The features that imgfuse does not keep up go before anything else changes (I8).
Result<> Qcow2Disk::clear_autoclear_bits() {
  const uint64_t kept = header_.autoclear & ((bitmaps_.stored() ? kBitmaps : 0) | (raw_data_ ? kRawDataFile : 0));
  if (header_.autoclear == kept) return {};
  const be<uint64_t> field(kept);
  IMG_TRY(image_.header_writer.write(kAutoclearField, std::as_bytes(std::span(&field, 1))));
  header_.autoclear = kept;
  return storage_->flush();
}

/// A raw data file; and where it may be written, no write may change an entry, now or ever: nothing takes away entries
/// of a raw data file, and what a growth adds has them.
int Qcow2Disk::share_host_file() {
  if (!raw_data_ || !snapshots_) return -1;
  if (read_only_) return data_->share_file();
  const auto lease = ranges_.exclusive({GuestOffset(0), std::numeric_limits<uint64_t>::max()});
  const Result<bool> linked = is_linked({GuestOffset(0), do_size()});
  return linked && *linked && bitmaps_.stop_watching() ? data_->share_file() : -1;
}

Result<bool> Qcow2Disk::is_linked(GuestRange range) {
  while (!range.empty()) {
    IMG_LET(const WriteRun run, map_.plan_write(range));
    if (!run.linked) return false;
    range = {range.begin + run.length, range.length - run.length};
  }
  return true;
}

DiskInfo Qcow2Disk::do_info() const {
  return {.name = storage_->info().name,
          .format = "qcow2",
          .size = do_size(),
          .cluster_size = static_cast<uint32_t>(image_.geometry.cluster_size),
          .read_only = read_only_,
          .subcluster_size = static_cast<uint32_t>(image_.geometry.subcluster_size)};
}

// ---- Reading

Result<> Qcow2Disk::do_read(GuestOffset offset, Bytes out) {
  const auto lease = ranges_.shared({offset, out.size()});
  return note(read_range(offset, out));
}

Result<> Qcow2Disk::read_range(GuestOffset offset, Bytes out) {
  std::vector<CompressedPiece> compressed;
  while (!out.empty()) {
    IMG_LET(const Mapping run, map_.lookup({offset, out.size()}));
    const Bytes part = out.first(run.length);
    switch (run.kind) {
      case ClusterKind::normal:
        IMG_TRY(data_->read(run.host, part));
        break;
      case ClusterKind::zero_plain:
      case ClusterKind::zero_allocated:
        std::memset(part.data(), 0, part.size());
        break;
      case ClusterKind::reserved:
      case ClusterKind::unallocated:
        IMG_TRY(read_below(backing_.get(), backing_size_, offset, part));
        break;
      case ClusterKind::compressed:
        compressed.push_back({run.compressed, offset, part});
        break;
    }
    offset = offset + run.length;
    out = out.subspan(run.length);
  }
  return compressed.empty() ? Result<>{} : read_compressed(compressed);
}

bool Qcow2Disk::reads_zero(const Mapping& mapping, GuestRange range) const {
  switch (mapping.kind) {
    case ClusterKind::zero_plain:
    case ClusterKind::zero_allocated:
      return true;
    case ClusterKind::reserved:
    case ClusterKind::unallocated:
      return range.begin.bytes() >= backing_size_;
    case ClusterKind::normal:
    case ClusterKind::compressed:
      return false;
  }
  return false;
}

// ---- Map

Result<std::vector<Extent>> Qcow2Disk::do_map(GuestRange range, size_t max_extents) {
  ExtentList extents(max_extents);
  // No lease: the answer may be out of date when it arrives in any case, and nothing is read but tables.
  while (!range.empty() && extents.wants_more()) {
    IMG_LET(const Mapping run, map_.lookup(range));
    GuestRange part{range.begin, run.length};
    Extent extent{.range = part};
    switch (run.kind) {
      case ClusterKind::normal:
        extent.kind = ExtentKind::data;
        extent.allocated = extent.has_host_offset = true;
        extent.host = run.host;
        break;
      case ClusterKind::zero_allocated:
        extent.kind = ExtentKind::zero;
        extent.allocated = extent.has_host_offset = true;
        extent.host = run.host;
        break;
      case ClusterKind::zero_plain:
        extent.kind = ExtentKind::zero;
        break;
      case ClusterKind::compressed:
        extent.kind = ExtentKind::data;
        extent.allocated = extent.compressed = true;
        break;
      case ClusterKind::reserved:
      case ClusterKind::unallocated:
        if (part.begin.bytes() < backing_size_) {
          part.length = std::min(part.length, backing_size_ - part.begin.bytes());
          IMG_LET(const uint64_t covered, extents.append_below(*backing_, part));
          range = {range.begin + covered, range.length - covered};
          continue;
        }
        extent.has_host_offset = run.kind == ClusterKind::reserved;
        extent.host = run.host;
        break;
    }
    extents.append(extent);
    range = {range.begin + part.length, range.length - part.length};
  }
  return extents.take();
}

DiskStatistics Qcow2Disk::statistics() const {
  DiskStatistics statistics;
  image_.tables.add_to(statistics);
  if (const auto& cache = image_.inflated.cache()) {
    const ClusterCache::Statistics clusters = cache->statistics();
    statistics.cluster_hits = clusters.hits;
    statistics.clusters_inflated = clusters.inflated;
  }
  statistics.flush_cycles = flusher_.cycles();
  statistics.quarantine = allocator_.quarantined() * image_.geometry.cluster_size;
  return statistics;
}

/// Entries say nothing of the space that a data file has.
uint64_t Qcow2Disk::do_allocated() const {
  return image_.geometry.l2.data_file ? data_->allocated().value_or(0) : map_.allocated();
}

Result<> Qcow2Disk::do_count_allocated(const std::atomic<bool>& stop) {
  while (!stop.load(std::memory_order_relaxed)) {
    IMG_LET(const bool more, map_.count_next(do_size()));
    if (!more) {
      counted_ = true;
      break;
    }
  }
  return {};
}

// ---- Flushing and closing

Result<> Qcow2Disk::do_flush() {
  if (read_only_) return {};
  if (!lazy_) allocator_.count_ahead();
  return flusher_.flush();
}

void Qcow2Disk::cut() {
  ExclusiveLock lock(image_.mutex);
  cycle_.lazy = lazy_ && strict_ == 0;
  if (!cycle_.lazy || counts_wanted_) {
    counts_wanted_ = false;
    cycle_.counts = image_.tables.freeze(kCountStage);
    cycle_.counts_first = std::exchange(image_.counts_first, false) && !cycle_.lazy;
    cycle_.ahead = allocator_.counting();
  }
  cycle_.slices = image_.tables.freeze(kMapStage);
  cycle_.l1 = map_.freeze_l1();
  cycle_.freed = allocator_.take_quarantine();
  cycle_.shows_bytes = std::exchange(image_.shows_bytes, false);
  const bool stale = !cycle_.counts.empty() || image_.tables.has_dirty(kCountStage);
  const bool relies_on_counts = !cycle_.slices.empty() || !cycle_.l1.entries.empty();
  cycle_.marks_dirty = cycle_.lazy && stale && relies_on_counts && !image_.header_writer.has(kDirty);
}

Result<bool> Qcow2Disk::write_stage(unsigned stage) {
  if (stage == kCountStage) {
    IMG_LET(cycle_.file_size, storage_->size());
    if (cycle_.marks_dirty) IMG_TRY(image_.header_writer.set(kDirty));
    if (image_.geometry.l2.data_file) IMG_TRY(data_->flush());  // I2
    IMG_TRY(image_.tables.write(cycle_.counts));
    return !cycle_.counts.empty() || cycle_.marks_dirty;
  }
  IMG_TRY(image_.tables.write(cycle_.slices));
  IMG_TRY(map_.write_l1(cycle_.l1));
  return !cycle_.slices.empty() || !cycle_.l1.entries.empty();
}

bool Qcow2Disk::needs_barrier(unsigned) const {
  return cycle_.counts_first || cycle_.marks_dirty || cycle_.shows_bytes;
}

void Qcow2Disk::end_cycle(bool durable) {
  image_.tables.thaw(cycle_.counts, durable);
  image_.tables.thaw(cycle_.slices, durable);
  if (durable) {
    allocator_.durable_to(cycle_.file_size);
    allocator_.counts_durable(cycle_.ahead);
    if (Result<> released = allocator_.release(std::move(cycle_.freed)); !released) latch_.set(released.error());
  } else {
    map_.keep_l1(cycle_.l1);
    allocator_.keep(std::move(cycle_.freed));
  }
  cycle_ = {};
}

/// A cycle that writes counts too, whatever else it does.
Result<> Qcow2Disk::flush_counts() {
  counts_wanted_ = true;
  return flusher_.flush();
}

/// Nothing is dirty or in quarantine when it returns, and no dirty bit set, if nobody makes requests meanwhile. Needs a
/// Strict.
Result<> Qcow2Disk::write_out() {
  IMG_TRY(allocator_.give_back_counts());
  // The first cycle frees what was in quarantine, the second writes the lowered counts.
  do IMG_TRY(flusher_.flush());
  while (allocator_.has_quarantine() || image_.tables.statistics().dirty > 0);
  if (!lazy_ || !image_.header_writer.has(kDirty)) return {};
  Result<> cleared = image_.header_writer.clear(kDirty);
  if (cleared) cleared = storage_->flush();
  if (!cleared) latch_.set(cleared.error());
  return cleared;
}

Result<> Qcow2Disk::do_close() {
  inflaters_.stop();
  Result<> result;
  if (!closed_) {
    const Strict strict(*this);
    result = write_out();
    if (result) result = bitmaps_.store(flusher_);
    if (result) result = write_out();
    if (result) result = image_.header_writer.set_counts_ahead(false);
    if (result) result = allocator_.cut_ahead();
  }
  closed_ = true;
  if (backing_)
    if (Result<> below = backing_->close(); result && !below) result = std::move(below);
  backing_.reset();
  data_.reset();
  storage_.reset();  // and with it the image's locks
  hold_.reset();
  return result;
}

// ---- Doors

namespace {

/// Whether clusters can be compressed as the user wants.
Result<> check_compression(const Header& header, const std::optional<std::string>& wanted) {
  if (!wanted) return {};
  if (*wanted != "zlib" && *wanted != "zstd")
    return fail(ErrorCode::invalid, "compression {:?} is neither zlib nor zstd", *wanted);
  const std::string_view has = header.compression == Compression::zstd ? "zstd" : "zlib";
  if (*wanted != has)
    return fail(
        ErrorCode::unsupported,
        "the image's compression type is {0}, not {1}; use {0}, or copy the disk with imgfuse convert -c -O qcow2 "
        "-o compression_type={1}",
        has, *wanted);
  if (header.has_data_file())
    return fail(ErrorCode::unsupported, "an image with an external data file has no compressed clusters");
  return {};
}

/// The image was not closed cleanly: its counts are put right.
Result<> settle(Storage& storage, const Header& header) {
  if (header.incompatible & kDirty) return recount(storage);
  Result<> freed = free_counted_ahead(storage);
  if (freed || freed.error().code() != ErrorCode::corrupt) return freed;
  log_warning("{} was not closed cleanly, and space that nothing uses cannot be freed: {}; see imgfuse check",
              storage.info().name, freed.error().text());
  return {};
}

}  // namespace

Result<std::unique_ptr<Disk>> open(std::shared_ptr<Storage> storage, OpenParameters parameters) {
  IMG_LET(Header header, read_header(*storage, Purpose::read));
  if (header.incompatible & kCorrupt) {
    log_warning("{} is marked as corrupt{}; repair it with imgfuse check --repair all", storage->info().name,
                parameters.read_only ? "" : " and opened read-only");
    parameters.read_only = true;
  }
  if (!parameters.read_only) {
    IMG_LET(header, read_header(*storage, Purpose::write));
  }
  if (!parameters.read_only && ((header.incompatible & kDirty) || header.counts_ahead)) {
    IMG_TRY(settle(*storage, header));
    IMG_LET(header, read_header(*storage, Purpose::write));
  }
  if (parameters.snapshot) {
    if (!parameters.read_only) return fail(ErrorCode::invalid, "a snapshot can only be opened read-only");
    if (header.has_data_file())
      return fail(ErrorCode::unsupported, "an image with an external data file cannot have snapshots");
    IMG_LET(const SnapshotTable table, read_snapshot_table(*storage, header));
    IMG_LET(const size_t found, find_snapshot(table.snapshots, *parameters.snapshot));
    IMG_LET(header, as_of_snapshot(header, table.snapshots[found]));
  }
  if (!parameters.read_only) IMG_TRY(check_compression(header, parameters.compress));
  const BackingOpener open_backing = parameters.open_backing;
  const DataFileOpener open_data_file = parameters.open_data_file;
  auto disk = std::make_unique<Qcow2Disk>(std::move(storage), std::move(header), std::move(parameters));
  IMG_TRY(disk->start(open_backing, open_data_file));
  return disk;
}

}  // namespace imgfuse::qcow2
