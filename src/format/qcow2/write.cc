// How guest writes, zeroes and preallocation change an image.
#include <algorithm>
#include <array>

#include "base/buffer.h"
#include "core/pieces.h"
#include "format/qcow2/qcow2_disk.h"

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

Result<> Qcow2Disk::do_write(GuestOffset offset, ConstBytes data) {
  IMG_TRY(latch_.check());
  if (read_only_) return fail(ErrorCode::read_only, "{} is open read-only", storage_->info().name);
  return compress_ ? write_compressed(offset, data) : write_plain(offset, data);
}

Result<> Qcow2Disk::write_plain(GuestOffset offset, ConstBytes data) {
  {
    const auto lease = ranges_.shared({offset, data.size()});
    bitmaps_.record({offset, data.size()});
    IMG_LET(const size_t written, write_in_place(offset, data));
    if (written == data.size()) return {};
    offset = offset + written;
    data = data.subspan(written);
  }
  {
    const auto lease = ranges_.exclusive(round_out({offset, data.size()}, image_.geometry.cluster_size));
    bitmaps_.record({offset, data.size()});  // again: one may have been cleared while there was no lease
    IMG_TRY(write_runs(offset, data));
  }
  return relieve();
}

/// Writes under an exclusive lease.
Result<> Qcow2Disk::write_runs(GuestOffset offset, ConstBytes data) {
  while (!data.empty()) {
    IMG_LET(const Mapping run, map_.lookup({offset, data.size()}));
    IMG_LET(const size_t written, write_run(run, offset, data.first(run.length)));
    offset = offset + written;
    data = data.subspan(written);
  }
  return {};
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
      bitmaps_.record({range.begin, length});
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

// ---- Forgetting

Result<> Qcow2Disk::do_forget(GuestRange range) {
  while (!range.empty()) {
    IMG_TRY(latch_.check());
    const uint64_t length = std::min(range.length, kPiece - range.begin.bytes() % kPiece);
    {
      const GuestRange clusters = round_out({range.begin, length}, image_.geometry.cluster_size);
      const auto lease = ranges_.exclusive(clusters);
      bitmaps_.record({range.begin, length});
      IMG_TRY(forget_clusters(clusters));
    }
    IMG_TRY(relieve());
    range = {range.begin + length, range.length - length};
  }
  return {};
}

Result<> Qcow2Disk::forget_clusters(GuestRange range) {
  const Geometry& g = image_.geometry;
  while (!range.empty()) {
    IMG_LET(const Mapping run, map_.lookup(range));
    if (run.kind != ClusterKind::unallocated) {
      IMG_LET(const TableCache::Pin slice, map_.writable_slice(range.begin));
      map_.unmap(slice, range.begin, run.length >> g.cluster_bits);
    }
    range = {range.begin + run.length, range.length - run.length};
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

}  // namespace imgfuse::qcow2
