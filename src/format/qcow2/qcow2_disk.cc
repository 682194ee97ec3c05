#include "format/qcow2/qcow2_disk.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <limits>

#include "base/buffer.h"
#include "base/endian.h"
#include "core/codec.h"
#include "core/pieces.h"

namespace imgfuse::qcow2 {
namespace {

/// Longest piece of a zeroing or populating request that holds its lease at once.
constexpr uint64_t kPiece = 256 << 20;

/// Scratch memory of the calling thread, at least `size` bytes.
Bytes scratch(size_t size) {
  thread_local Buffer buffer;
  buffer.reserve(size);
  return buffer.bytes().first(size);
}

}  // namespace

Qcow2Disk::Qcow2Disk(std::shared_ptr<Storage> storage, Header header, OpenParameters parameters)
    : storage_(std::move(storage)),
      header_(std::move(header)),
      read_only_(parameters.read_only),
      size_(header_.size),
      image_(*storage_, header_, parameters.metadata_cache),
      refcounts_(image_),
      allocator_(image_, refcounts_, latch_),
      map_(image_, allocator_),
      flusher_(*storage_, *this, TableCache::kStages, latch_) {}

Qcow2Disk::~Qcow2Disk() { assert(closed_ && "a writable disk must be closed"); }

Result<> Qcow2Disk::start(const BackingOpener& open_backing) {
  {
    ExclusiveLock lock(image_.mutex);
    image_.known.add(0);
    if (header_.snapshot_count > 0) image_.known.add(image_.geometry.cluster_of(header_.snapshots_offset));
  }
  if (!read_only_) IMG_TRY(refcounts_.load(header_));
  IMG_TRY(map_.load(header_, !read_only_));
  if (header_.backing_name) {
    if (!open_backing) return fail(ErrorCode::invalid, "no way to open the backing file {}", *header_.backing_name);
    IMG_LET(backing_, open_backing(*header_.backing_name, header_.backing_format));
    backing_size_ = backing_->size();
  }
  if (read_only_) return {};
  IMG_LET(const uint64_t file_size, storage_->size());
  allocator_.start(file_size);
  image_.tables.set_make_room([this] { (void)flusher_.flush(); });  // an error stays in the latch
  IMG_TRY(clear_autoclear_bits());
  closed_ = false;
  return {};
}

/// imgfuse maintains none of the features that autoclear bits stand for, so they go before anything else changes.
Result<> Qcow2Disk::clear_autoclear_bits() {
  if (header_.autoclear == 0) return {};
  const be<uint64_t> none(0);
  IMG_TRY(storage_->write(kIncompatibleField + 16, std::as_bytes(std::span(&none, 1))));
  header_.autoclear = 0;
  return storage_->flush();
}

DiskInfo Qcow2Disk::do_info() const {
  return {.name = storage_->info().name,
          .format = "qcow2",
          .size = do_size(),
          .cluster_size = static_cast<uint32_t>(image_.geometry.cluster_size),
          .read_only = read_only_};
}

// ---- Reading

Result<> Qcow2Disk::do_read(GuestOffset offset, Bytes out) {
  const auto lease = ranges_.shared({offset, out.size()});
  return read_range(offset, out);
}

Result<> Qcow2Disk::read_range(GuestOffset offset, Bytes out) {
  while (!out.empty()) {
    IMG_LET(const Mapping run, map_.lookup({offset, out.size()}));
    const Bytes part = out.first(run.length);
    switch (run.kind) {
      case ClusterKind::normal:
        IMG_TRY(storage_->read(run.host, part));
        break;
      case ClusterKind::zero_plain:
      case ClusterKind::zero_allocated:
        std::memset(part.data(), 0, part.size());
        break;
      case ClusterKind::unallocated:
        IMG_TRY(read_backing(offset, part));
        break;
      case ClusterKind::compressed:
        IMG_TRY(read_compressed(run, offset, part));
        break;
    }
    offset = offset + run.length;
    out = out.subspan(run.length);
  }
  return {};
}

/// The backing file may be shorter: zeros past its end.
Result<> Qcow2Disk::read_backing(GuestOffset offset, Bytes out) {
  const uint64_t there = offset.bytes() < backing_size_ ? std::min(out.size(), backing_size_ - offset.bytes()) : 0;
  if (there < out.size()) std::memset(out.data() + there, 0, out.size() - there);
  return there == 0 ? Result<>{} : backing_->read(offset, out.first(there));
}

Result<> Qcow2Disk::read_compressed(const Mapping& mapping, GuestOffset offset, Bytes out) {
  const Geometry& g = image_.geometry;
  thread_local Buffer stream;
  thread_local Buffer cluster;
  stream.reserve(mapping.compressed.length);
  const Bytes in = stream.bytes().first(mapping.compressed.length);
  IMG_TRY(storage_->read(mapping.compressed.offset, in));

  const bool whole = out.size() == g.cluster_size;
  if (!whole) cluster.reserve(g.cluster_size);
  const Bytes plain = whole ? out : cluster.bytes().first(g.cluster_size);
  Result<> done = g.compression == Compression::zstd ? codec::unzstd(in, plain) : codec::inflate(in, plain);
  if (!done)
    return fail(done.error().during("compressed cluster at {:#x} for guest offset {:#x}",
                                    mapping.compressed.offset.bytes(), round_down(offset.bytes(), g.cluster_size)));
  if (!whole) std::memcpy(out.data(), plain.data() + offset.bytes() % g.cluster_size, out.size());
  return {};
}

bool Qcow2Disk::reads_zero(const Mapping& mapping, GuestRange range) const {
  switch (mapping.kind) {
    case ClusterKind::zero_plain:
    case ClusterKind::zero_allocated:
      return true;
    case ClusterKind::unallocated:
      return range.begin.bytes() >= backing_size_;
    case ClusterKind::normal:
    case ClusterKind::compressed:
      return false;
  }
  return false;
}

// ---- Writing

Result<> Qcow2Disk::do_write(GuestOffset offset, ConstBytes data) {
  IMG_TRY(latch_.check());
  if (read_only_) return fail(ErrorCode::read_only, "{} is open read-only", storage_->info().name);
  {
    const auto lease = ranges_.shared({offset, data.size()});
    IMG_LET(const size_t written, write_in_place(offset, data));
    if (written == data.size()) return {};
    offset = offset + written;
    data = data.subspan(written);
  }
  {
    const auto lease = ranges_.exclusive(round_out({offset, data.size()}, image_.geometry.cluster_size));
    while (!data.empty()) {
      IMG_LET(const Mapping run, map_.lookup({offset, data.size()}));
      IMG_LET(const size_t written, write_run(run, offset, data.first(run.length)));
      offset = offset + written;
      data = data.subspan(written);
    }
  }
  return relieve();
}

/// Writes the leading runs that are this image's alone; stops at the first that needs new clusters.
Result<size_t> Qcow2Disk::write_in_place(GuestOffset offset, ConstBytes data) {
  size_t written = 0;
  while (written < data.size()) {
    IMG_LET(const Mapping run, map_.lookup({offset + written, data.size() - written}));
    if (run.kind != ClusterKind::normal || !run.copied) break;
    IMG_TRY(storage_->write(run.host, data.subspan(written, run.length)));
    written += run.length;
  }
  return written;
}

/// Writes one run under an exclusive lease; returns how much of it, at least one cluster's worth.
Result<size_t> Qcow2Disk::write_run(const Mapping& mapping, GuestOffset offset, ConstBytes data) {
  if (mapping.kind == ClusterKind::normal && mapping.copied) {
    IMG_TRY(storage_->write(mapping.host, data));
    return data.size();
  }
  if (mapping.kind == ClusterKind::zero_allocated && mapping.copied)
    return write_reserved_clusters(mapping, offset, data);
  return write_new_clusters(mapping, offset, data);
}

/// A full device may have room when the quarantine is released.
Result<Reservation> Qcow2Disk::reserve(uint64_t clusters) {
  Result<Reservation> reservation = allocator_.reserve(clusters);
  if (reservation || reservation.error().code() != ErrorCode::no_space || !allocator_.has_quarantine())
    return reservation;
  IMG_TRY(flusher_.flush());
  return allocator_.reserve(clusters);
}

Result<size_t> Qcow2Disk::write_new_clusters(const Mapping& mapping, GuestOffset offset, ConstBytes data) {
  const Geometry& g = image_.geometry;
  const GuestRange clusters = round_out({offset, data.size()}, g.cluster_size);
  IMG_LET(const TableCache::Pin slice, map_.writable_slice(offset));
  // lookup() stops at slice borders only where there is a table, so a run without one may be longer.
  const uint64_t in_slice = g.slice_coverage() - clusters.begin.bytes() % g.slice_coverage();
  IMG_LET(Reservation reservation, reserve(std::min(clusters.length, in_slice) >> g.cluster_bits));

  const uint64_t room = (reservation.clusters() << g.cluster_bits) - (offset - clusters.begin);
  data = data.first(std::min(data.size(), room));
  IMG_TRY(write_around(mapping, reservation.host(), offset, data, reservation.fresh()));
  map_.link(slice, clusters.begin, reservation.host(), reservation.clusters());
  reservation.commit();
  return data.size();
}

/// Zero clusters that kept their host clusters: the rest of what is touched holds old bytes and is zeroed.
Result<size_t> Qcow2Disk::write_reserved_clusters(const Mapping& mapping, GuestOffset offset, ConstBytes data) {
  const Geometry& g = image_.geometry;
  const GuestRange clusters = round_out({offset, data.size()}, g.cluster_size);
  IMG_LET(const TableCache::Pin slice, map_.writable_slice(offset));
  const HostOffset host = mapping.host - (offset - clusters.begin);
  IMG_TRY(write_around(mapping, host, offset, data, false));
  map_.link(slice, clusters.begin, host, clusters.length >> g.cluster_bits);
  return data.size();
}

/// Fills whole clusters at `host` in one host write: `data`, and around it what the clusters read as until now.
Result<> Qcow2Disk::write_around(const Mapping& old, HostOffset host, GuestOffset offset, ConstBytes data,
                                 bool host_is_zero) {
  const GuestRange clusters = round_out({offset, data.size()}, image_.geometry.cluster_size);
  const GuestRange head{clusters.begin, offset - clusters.begin};
  const GuestRange tail{offset + data.size(), clusters.end() - (offset + data.size())};
  if (reads_zero(old, clusters)) {
    if (host_is_zero) return storage_->write(host + head.length, data);
    return storage_->write(host, std::array{zeroes(head.length), data, zeroes(tail.length)});
  }
  const Bytes around = scratch(head.length + tail.length);
  const Bytes before = around.first(head.length);
  const Bytes after = around.subspan(head.length);
  if (!before.empty()) IMG_TRY(read_range(head.begin, before));
  if (!after.empty()) IMG_TRY(read_range(tail.begin, after));
  return storage_->write(host, std::array<ConstBytes, 3>{before, data, after});
}

/// Asks for a flush cycle when too much is dirty or waits to be freed. Called without a lease.
Result<> Qcow2Disk::relieve() {
  if (image_.tables.wants_flush() || allocator_.wants_flush()) return flusher_.flush();
  return {};
}

// ---- Zeroing

Result<> Qcow2Disk::do_write_zeroes(GuestRange range, Zeroing zeroing) {
  while (!range.empty()) {
    IMG_TRY(latch_.check());
    const uint64_t length = std::min(range.length, kPiece - range.begin.bytes() % kPiece);
    {
      const auto lease = ranges_.exclusive(round_out({range.begin, length}, image_.geometry.cluster_size));
      IMG_TRY(zero_range({range.begin, length}, zeroing));
    }
    IMG_TRY(relieve());
    range = {range.begin + length, range.length - length};
  }
  return {};
}

Result<> Qcow2Disk::zero_range(GuestRange range, Zeroing zeroing) {
  // The cluster that the end of the disk cuts counts as whole.
  if (range.end().bytes() == do_size())
    range.length = round_out(range, image_.geometry.cluster_size).end() - range.begin;
  const Pieces pieces = split(range, image_.geometry.cluster_size);
  IMG_TRY(zero_part(pieces.head));
  IMG_TRY(zero_clusters(pieces.whole, zeroing));
  return zero_part(pieces.tail);
}

/// Part of one cluster.
Result<> Qcow2Disk::zero_part(GuestRange range) {
  if (range.empty()) return {};
  IMG_LET(const Mapping run, map_.lookup(range));
  return reads_zero(run, range) ? Result<>{} : overwrite_with_zeroes(range);
}

Result<> Qcow2Disk::zero_clusters(GuestRange range, Zeroing zeroing) {
  while (!range.empty()) {
    IMG_LET(const Mapping run, map_.lookup(range));
    IMG_LET(const uint64_t done, zero_run(run, {range.begin, run.length}, zeroing));
    range = {range.begin + done, range.length - done};
  }
  return {};
}

/// Whole clusters of one kind; returns how many bytes of the run are done.
Result<uint64_t> Qcow2Disk::zero_run(const Mapping& mapping, GuestRange range, Zeroing zeroing) {
  const Geometry& g = image_.geometry;
  const bool keep = zeroing == Zeroing::keep_allocation;
  if (reads_zero(mapping, range) && (keep || mapping.kind != ClusterKind::zero_allocated)) return range.length;
  if (!g.has_zero_flag() && (keep || backing_)) {
    IMG_TRY(overwrite_with_zeroes(range));
    return range.length;
  }
  IMG_LET(const TableCache::Pin slice, map_.writable_slice(range.begin));
  const uint64_t length = std::min(range.length, g.slice_coverage() - range.begin.bytes() % g.slice_coverage());
  if (g.has_zero_flag()) {
    map_.zero(slice, range.begin, length >> g.cluster_bits, keep);
  } else {
    map_.unmap(slice, range.begin, length >> g.cluster_bits);
  }
  return length;
}

Result<> Qcow2Disk::overwrite_with_zeroes(GuestRange range) {
  while (!range.empty()) {
    const uint64_t wanted = std::min<uint64_t>(range.length, kZeroesSize);
    IMG_LET(const Mapping run, map_.lookup({range.begin, wanted}));
    uint64_t done = run.length;
    if (run.kind == ClusterKind::normal && run.copied) {
      IMG_TRY(storage_->write_zeroes({run.host, run.length}));
    } else if (!reads_zero(run, {range.begin, run.length})) {
      IMG_LET(done, write_run(run, range.begin, zeroes(run.length)));
    }
    range = {range.begin + done, range.length - done};
  }
  return {};
}

// ---- Populating

Result<> Qcow2Disk::do_populate(GuestRange range) {
  const uint64_t size = do_size();
  while (!range.empty()) {
    IMG_TRY(latch_.check());
    const uint64_t length = std::min(range.length, kPiece - range.begin.bytes() % kPiece);
    {
      const GuestRange clusters = round_out({range.begin, length}, image_.geometry.cluster_size);
      const auto lease = ranges_.exclusive(clusters);
      IMG_TRY(populate_range({clusters.begin, std::min(clusters.end().bytes(), size) - clusters.begin.bytes()}));
    }
    IMG_TRY(relieve());
    range = {range.begin + length, range.length - length};
  }
  return {};
}

Result<> Qcow2Disk::populate_range(GuestRange range) {
  while (!range.empty()) {
    IMG_LET(const Mapping run, map_.lookup(range));
    IMG_LET(const uint64_t done, populate_run(run, {range.begin, run.length}));
    range = {range.begin + done, range.length - done};
  }
  return {};
}

/// Gives a run host clusters of its own; returns how many bytes of it are done.
Result<uint64_t> Qcow2Disk::populate_run(const Mapping& mapping, GuestRange range) {
  const Geometry& g = image_.geometry;
  if (mapping.kind == ClusterKind::compressed || mapping.kind == ClusterKind::normal ||
      mapping.kind == ClusterKind::zero_allocated)
    return range.length;
  if (!reads_zero(mapping, range) || !g.has_zero_flag()) {
    Buffer content(std::min<uint64_t>(range.length, g.cluster_size));
    IMG_TRY(read_range(range.begin, content.bytes()));
    IMG_LET(const size_t done, write_run(mapping, range.begin, content.bytes()));
    return done;
  }
  IMG_LET(const TableCache::Pin slice, map_.writable_slice(range.begin));
  const GuestRange clusters = round_out(range, g.cluster_size);
  const uint64_t in_slice = g.slice_coverage() - clusters.begin.bytes() % g.slice_coverage();
  IMG_LET(Reservation reservation, reserve(std::min(clusters.length, in_slice) >> g.cluster_bits));
  const uint64_t length = reservation.clusters() << g.cluster_bits;
  IMG_TRY(storage_->allocate({reservation.host(), length}));
  map_.link_zero(slice, clusters.begin, reservation.host(), reservation.clusters());
  reservation.commit();
  return std::min(length, range.length);
}

// ---- Map

Result<std::vector<Extent>> Qcow2Disk::do_map(GuestRange range, size_t max_extents) {
  std::vector<Extent> extents;
  const auto append = [&](const Extent& next) {
    if (!extents.empty()) {
      Extent& last = extents.back();
      const bool same = last.kind == next.kind && last.depth == next.depth && last.compressed == next.compressed &&
                        last.allocated == next.allocated && last.has_host_offset == next.has_host_offset &&
                        (!next.has_host_offset || last.host + last.range.length == next.host);
      if (same) {
        last.range.length += next.range.length;
        return;
      }
    }
    extents.push_back(next);
  };
  // No lease: the answer may be out of date when it arrives in any case, and nothing is read but tables.
  while (!range.empty() && extents.size() <= max_extents) {
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
      case ClusterKind::unallocated:
        if (part.begin.bytes() < backing_size_) {
          part.length = std::min(part.length, backing_size_ - part.begin.bytes());
          IMG_LET(const std::vector<Extent> below, backing_->map(part, max_extents));
          for (Extent deeper : below) {
            ++deeper.depth;
            append(deeper);
          }
          const uint64_t covered = below.back().range.end() - part.begin;
          range = {range.begin + covered, range.length - covered};
          continue;
        }
        break;
    }
    append(extent);
    range = {range.begin + part.length, range.length - part.length};
  }
  if (extents.size() > max_extents) extents.resize(max_extents);
  return extents;
}

uint64_t Qcow2Disk::do_allocated() const { return map_.allocated(); }

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
  return flusher_.flush();
}

void Qcow2Disk::cut() {
  ExclusiveLock lock(image_.mutex);
  cycle_.counts = image_.tables.freeze(kCountStage);
  cycle_.slices = image_.tables.freeze(kMapStage);
  cycle_.l1 = map_.freeze_l1();
  cycle_.freed = allocator_.take_quarantine();
}

Result<bool> Qcow2Disk::write_stage(unsigned stage) {
  if (stage == kCountStage) {
    IMG_TRY(image_.tables.write(cycle_.counts));
    return !cycle_.counts.empty();
  }
  IMG_TRY(image_.tables.write(cycle_.slices));
  IMG_TRY(map_.write_l1(cycle_.l1));
  return !cycle_.slices.empty() || !cycle_.l1.entries.empty();
}

void Qcow2Disk::end_cycle(bool durable) {
  image_.tables.thaw(cycle_.counts, durable);
  image_.tables.thaw(cycle_.slices, durable);
  if (durable) {
    if (Result<> released = allocator_.release(std::move(cycle_.freed)); !released) latch_.set(released.error());
  } else {
    map_.keep_l1(cycle_.l1);
    allocator_.keep(std::move(cycle_.freed));
  }
  cycle_ = {};
}

Result<> Qcow2Disk::do_close() {
  Result<> result;
  if (!closed_) {
    // The first cycle frees what was in quarantine, the second writes the lowered counts.
    do result = flusher_.flush();
    while (result && (allocator_.has_quarantine() || image_.tables.statistics().dirty > 0));
  }
  closed_ = true;
  if (backing_)
    if (Result<> below = backing_->close(); result && !below) result = std::move(below);
  return result;
}

// ---- Resizing

Result<> Qcow2Disk::do_resize(uint64_t size) {
  const Geometry& g = image_.geometry;
  const uint64_t old_size = do_size();
  if (size % 512 != 0) return fail(ErrorCode::invalid, "size {} is not a multiple of 512", size);
  if (size > max_virtual_size(g.cluster_bits))
    return fail(ErrorCode::invalid, "size {} is past the largest disk of this cluster size, {}", size,
                max_virtual_size(g.cluster_bits));
  const auto lease = ranges_.exclusive({GuestOffset(0), std::numeric_limits<uint64_t>::max()});
  IMG_TRY(latch_.check());
  if (size == old_size) return {};
  if (size < old_size)
    return fail(ErrorCode::unsupported, "shrinking from {} to {} bytes is not supported", old_size, size);
  if (header_.version < 3 && header_.snapshot_count > 0)
    return fail(ErrorCode::unsupported, "a version 2 image with snapshots cannot be resized");
  if (map_.has_tables_from(GuestOffset(old_size)))
    return fail(ErrorCode::unsupported, "the image holds a saved virtual machine state behind the disk's end");

  if (const uint64_t needed = divide_up(size, g.l2_coverage); needed > map_.l1_entries()) IMG_TRY(grow_l1(needed));
  // What lies behind the old end, old content of the last cluster or a longer backing file, must read as zeros.
  const uint64_t table_end = round_up(old_size, g.l2_coverage);
  const uint64_t dirty_end = round_up(std::min(size, std::max(table_end, backing_size_)), g.cluster_size);
  if (dirty_end > old_size) IMG_TRY(zero_range({GuestOffset(old_size), dirty_end - old_size}, Zeroing::may_free));
  IMG_TRY(flusher_.flush());
  return write_size(size);
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
  Result<> switched = storage_->write(kSizeField + 12, std::as_bytes(std::span(&field, 1)));
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
  Result<> written = storage_->write(kSizeField, std::as_bytes(std::span(&field, 1)));
  if (written) written = storage_->flush();
  if (!written) {
    latch_.set(written.error());
    return written;
  }
  size_ = size;
  return {};
}

// ---- Doors

Result<std::unique_ptr<Disk>> open(std::shared_ptr<Storage> storage, OpenParameters parameters) {
  IMG_LET(Header header, read_header(*storage, parameters.read_only ? Purpose::read : Purpose::write));
  if (!parameters.read_only && (header.incompatible & kDirty)) {
    IMG_LET(const CheckReport report, check(*storage, Repair::all, [](const std::string&) {}));
    if (report.corruptions > 0 || report.check_errors > 0)
      return fail(ErrorCode::corrupt,
                  "the image was not closed cleanly and {} damaged entries could not be repaired; it can be opened "
                  "read-only",
                  report.corruptions + report.check_errors);
    IMG_LET(header, read_header(*storage, Purpose::write));
  }
  const BackingOpener open_backing = parameters.open_backing;
  auto disk = std::make_unique<Qcow2Disk>(std::move(storage), std::move(header), std::move(parameters));
  IMG_TRY(disk->start(open_backing));
  return disk;
}

}  // namespace imgfuse::qcow2
