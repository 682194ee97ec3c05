// How guest writes, zeroes and preallocation change an image.
#include <algorithm>
#include <array>

#include "base/buffer.h"
#include "core/host_space.h"
#include "core/pieces.h"
#include "format/qcow2/qcow2_disk.h"

namespace imgfuse::qcow2 {
namespace {

/// Longest piece of a zeroing or populating request that holds its lease at once.
constexpr uint64_t kPiece = 256 << 20;

/// Each guest byte has its place in a data file.
HostRange place_in_data_file(GuestRange range) { return {HostOffset(range.begin.bytes()), range.length}; }

}  // namespace

Result<> Qcow2Disk::do_write(GuestOffset offset, ConstBytes data) {
  IMG_TRY(latch_.check());
  if (read_only_) return fail(ErrorCode::read_only, "{} is open read-only", storage_->info().name);
  return note(compress_ ? write_compressed(offset, data) : write_plain(offset, data));
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
    IMG_LET(const WriteRun run, map_.plan_write({offset, data.size()}));
    IMG_LET(const size_t written, write_run(run, offset, data.first(run.length)));
    offset = offset + written;
    data = data.subspan(written);
  }
  return {};
}

/// Writes the leading runs that need no change of an entry.
Result<size_t> Qcow2Disk::write_in_place(GuestOffset offset, ConstBytes data) {
  size_t written = 0;
  while (written < data.size()) {
    IMG_LET(const WriteRun run, map_.plan_write({offset + written, data.size() - written}));
    if (!run.linked) break;
    IMG_TRY(data_->write(run.host, data.subspan(written, run.length)));
    written += run.length;
  }
  return written;
}

/// Writes one run under an exclusive lease; returns how much of it, at least up to the next cluster.
Result<size_t> Qcow2Disk::write_run(const WriteRun& run, GuestOffset offset, ConstBytes data) {
  if (!run.linked && raw_data_) {
    // The entry goes first, while the file reads as zeros like the disk: were the data first, a crash could leave it in
    // the file, and zeros on the disk (I12).
    IMG_TRY(link_raw_data(round_out({offset, data.size()}, image_.geometry.subcluster_size)));
    IMG_TRY(flusher_.flush());
  }
  if (run.linked || raw_data_) {
    const HostOffset host = raw_data_ ? HostOffset(offset.bytes()) : run.host;
    IMG_TRY(data_->write(host, data));
    return data.size();
  }
  IMG_LET(const TableCache::Pin slice, map_.writable_slice(offset));
  if (!run.in_place) return write_new_clusters(slice, run, offset, data);
  // The clusters hold old bytes where they are not linked.
  const GuestRange filled{offset - run.head, run.head + data.size() + run.tail};
  IMG_TRY(write_around(filled, run.host - run.head, offset, data, false));
  map_.link(slice, filled, run.host - run.head);
  return data.size();
}

/// A full device may have room when the quarantine is released.
Result<Reservation> Qcow2Disk::reserve(uint64_t clusters) {
  Result<Reservation> reservation = allocator_.reserve(clusters);
  if (reservation || reservation.error().code() != ErrorCode::no_space || !allocator_.has_quarantine())
    return reservation;
  IMG_TRY(flusher_.flush());
  return allocator_.reserve(clusters);
}

/// Host clusters for guest clusters: in a data file each has its place.
Result<Reservation> Qcow2Disk::reserve_for(GuestRange clusters) {
  const Geometry& g = image_.geometry;
  const uint64_t count = clusters.length >> g.cluster_bits;
  if (g.l2.data_file) return Reservation::fixed(HostOffset(clusters.begin.bytes()), count);
  return reserve(count);
}

Result<size_t> Qcow2Disk::write_new_clusters(const TableCache::Pin& slice, const WriteRun& run, GuestOffset offset,
                                             ConstBytes data) {
  const Geometry& g = image_.geometry;
  const GuestRange clusters = round_out({offset, data.size()}, g.cluster_size);
  IMG_LET(Reservation reservation, reserve_for(clusters));

  const uint64_t room = (reservation.clusters() << g.cluster_bits) - (offset - clusters.begin);
  const bool fits = data.size() <= room;
  if (!fits) data = data.first(room);
  const GuestRange filled{offset - run.head, run.head + data.size() + (fits ? run.tail : 0)};
  const HostOffset host = reservation.host() + (filled.begin - clusters.begin);
  Shows shows = Shows::bytes;
  if (reservation.blank()) {
    IMG_LET(const bool zero, reads_zero({clusters.begin, reservation.clusters() << g.cluster_bits}));
    if (zero) shows = Shows::zeros;
  }
  IMG_TRY(write_around(filled, host, offset, data, reservation.fresh()));
  map_.link(slice, filled, host, shows);
  reservation.commit();
  return data.size();
}

/// Fills `filled` at `host` in one host write: `data`, and around it what the disk reads as until now.
Result<> Qcow2Disk::write_around(GuestRange filled, HostOffset host, GuestOffset offset, ConstBytes data,
                                 bool host_is_zero) {
  const GuestRange head{filled.begin, offset - filled.begin};
  const GuestRange tail{offset + data.size(), filled.end() - (offset + data.size())};
  IMG_LET(const bool zero_head, reads_zero(head));
  IMG_LET(const bool zero_tail, reads_zero(tail));
  if (zero_head && zero_tail && host_is_zero) return data_->write(host + head.length, data);
  const Bytes around = scratch(zero_head && zero_tail ? 0 : head.length + tail.length);
  ConstBytes before = zeroes(zero_head ? head.length : 0);
  ConstBytes after = zeroes(zero_tail ? tail.length : 0);
  if (!zero_head) {
    before = around.first(head.length);
    IMG_TRY(read_range(head.begin, around.first(head.length)));
  }
  if (!zero_tail) {
    after = around.subspan(head.length);
    IMG_TRY(read_range(tail.begin, around.subspan(head.length)));
  }
  return data_->write(host, std::array{before, data, after});
}

/// True only if no byte has to be read to know it.
Result<bool> Qcow2Disk::reads_zero(GuestRange range) {
  while (!range.empty()) {
    IMG_LET(const Mapping run, map_.lookup(range));
    if (!reads_zero(run, {range.begin, run.length})) return false;
    range = {range.begin + run.length, range.length - run.length};
  }
  return true;
}

/// Asks for a flush cycle when too much is dirty or waits to be freed. Called without a lease.
Result<> Qcow2Disk::relieve() {
  if (image_.tables.wants_flush()) return flush_counts();
  return allocator_.wants_flush() ? flusher_.flush() : Result<>{};
}

// ---- Zeroing

Result<> Qcow2Disk::do_write_zeroes(GuestRange range, Zeroing zeroing) {
  while (!range.empty()) {
    IMG_TRY(latch_.check());
    const uint64_t length = std::min(range.length, kPiece - range.begin.bytes() % kPiece);
    {
      const auto lease = ranges_.exclusive(round_out({range.begin, length}, image_.geometry.cluster_size));
      bitmaps_.record({range.begin, length});
      IMG_TRY(note(zero_range({range.begin, length}, zeroing)));
    }
    IMG_TRY(relieve());
    range = {range.begin + length, range.length - length};
  }
  return {};
}

Result<> Qcow2Disk::zero_range(GuestRange range, Zeroing zeroing) {
  if (raw_data_) return zero_raw_data(range, zeroing);
  // The cluster that the end of the disk cuts counts as whole.
  if (range.end().bytes() == do_size())
    range.length = round_out(range, image_.geometry.cluster_size).end() - range.begin;
  const Pieces pieces = split(range, image_.geometry.subcluster_size);
  IMG_TRY(zero_part(pieces.head));
  IMG_TRY(zero_subclusters(pieces.whole, zeroing));
  return zero_part(pieces.tail);
}

/// Part of one subcluster.
Result<> Qcow2Disk::zero_part(GuestRange range) {
  IMG_LET(const bool zero, reads_zero(range));
  return zero ? Result<>{} : overwrite_with_zeroes(range);
}

Result<> Qcow2Disk::zero_subclusters(GuestRange range, Zeroing zeroing) {
  const uint64_t cluster_size = image_.geometry.cluster_size;
  while (!range.empty()) {
    IMG_LET(const Mapping run, map_.lookup(range));
    const uint64_t left_in_cluster = cluster_size - range.begin.bytes() % cluster_size;
    // Whole clusters of one kind together; else what is asked of this cluster.
    const bool whole = left_in_cluster == cluster_size && run.length >= cluster_size;
    const uint64_t piece = whole ? round_down(run.length, cluster_size) : std::min(range.length, left_in_cluster);
    IMG_LET(const uint64_t done, zero_run(run, {range.begin, piece}, zeroing));
    range = {range.begin + done, range.length - done};
  }
  return {};
}

/// Whole clusters of one kind, or subclusters of one cluster of which `mapping` is the first; returns how many bytes of
/// the range are done.
Result<uint64_t> Qcow2Disk::zero_run(const Mapping& mapping, GuestRange range, Zeroing zeroing) {
  const Geometry& g = image_.geometry;
  const bool keep = zeroing == Zeroing::keep_allocation;
  const bool holds_host = mapping.kind == ClusterKind::zero_allocated || mapping.kind == ClusterKind::reserved;
  const bool cut = range.length % g.cluster_size != 0;
  if ((keep || cut || !holds_host) && mapping.length >= range.length && reads_zero(mapping, range)) return range.length;
  if ((!g.has_zero_flag() && (keep || backing_)) || (cut && mapping.kind == ClusterKind::compressed)) {
    IMG_TRY(overwrite_with_zeroes(range));
    return range.length;
  }
  IMG_LET(const TableCache::Pin slice, map_.writable_slice(range.begin));
  range.length = std::min(range.length, g.slice_coverage() - range.begin.bytes() % g.slice_coverage());
  // What is written here later goes to the same place, so the space is given back at once, or not at all.
  if (g.l2.data_file && !keep) (void)data_->discard(place_in_data_file(range));
  if (g.has_zero_flag()) {
    map_.zero(slice, range, keep);
  } else {
    map_.unmap(slice, range);
  }
  return range.length;
}

/// The zeros are written to the file, and nowhere else: an entry with a zero flag could be durable without them, or
/// they without it.
Result<> Qcow2Disk::zero_raw_data(GuestRange range, Zeroing zeroing) {
  while (!range.empty()) {
    IMG_LET(const Mapping run, map_.lookup(range));
    const GuestRange part{range.begin, run.length};
    const HostRange place = place_in_data_file(part);
    if (!reads_zero(run, part))
      IMG_TRY(zeroing == Zeroing::may_free ? zero_and_free(*data_, place) : data_->write_zeroes(place));
    range = {part.end(), range.length - part.length};
  }
  return {};
}

/// Entries of whole subclusters come to say that the bytes lie in the raw data file. Where they said that there are
/// zeros, the file has zeros.
Result<> Qcow2Disk::link_raw_data(GuestRange range) {
  const uint64_t coverage = image_.geometry.slice_coverage();
  while (!range.empty()) {
    IMG_LET(const Mapping run, map_.lookup(range));
    const GuestRange part{range.begin, std::min(run.length, coverage - range.begin.bytes() % coverage)};
    if (run.kind != ClusterKind::normal) {
      const HostRange place = place_in_data_file(part);
      IMG_TRY(zero_and_free(*data_, place));
      IMG_LET(const TableCache::Pin slice, map_.writable_slice(part.begin));
      map_.link(slice, part, place.begin);
    }
    range = {part.end(), range.length - part.length};
  }
  return {};
}

Result<> Qcow2Disk::overwrite_with_zeroes(GuestRange range) {
  while (!range.empty()) {
    IMG_LET(const Mapping mapping, map_.lookup({range.begin, std::min<uint64_t>(range.length, kZeroesSize)}));
    const GuestRange part{range.begin, mapping.length};
    uint64_t done = part.length;
    if (!reads_zero(mapping, part)) {
      IMG_LET(const WriteRun run, map_.plan_write(part));
      done = run.length;
      if (run.linked) {
        IMG_TRY(data_->write_zeroes({run.host, run.length}));
      } else {
        IMG_LET(done, write_run(run, range.begin, zeroes(run.length)));
      }
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
      IMG_TRY(note(raw_data_ ? zero_raw_data({range.begin, length}, Zeroing::may_free) : forget_clusters(clusters)));
      if (image_.geometry.l2.data_file && !raw_data_) {
        IMG_TRY(flusher_.flush());  // until that is durable, a crash may bring the entries back
        (void)data_->discard(place_in_data_file(clusters));
      }
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
    const uint64_t length = std::max(round_down(run.length, g.cluster_size), g.cluster_size);
    if (run.kind != ClusterKind::unallocated || run.length < g.cluster_size) {
      IMG_LET(const TableCache::Pin slice, map_.writable_slice(range.begin));
      map_.unmap(slice, {range.begin, length});
    }
    range = {range.begin + length, range.length - length};
  }
  return {};
}

// ---- Populating

Result<> Qcow2Disk::do_populate(GuestRange range, Holes holes) {
  if (holes == Holes::keep && !backing_) return {};
  const uint64_t size = do_size();
  while (!range.empty()) {
    IMG_TRY(latch_.check());
    const uint64_t length = std::min(range.length, kPiece - range.begin.bytes() % kPiece);
    {
      const GuestRange clusters = round_out({range.begin, length}, image_.geometry.cluster_size);
      const auto lease = ranges_.exclusive(clusters);
      const GuestRange part{clusters.begin, std::min(clusters.end().bytes(), size) - clusters.begin.bytes()};
      IMG_TRY(note(holes == Holes::keep ? populate_data(part) : populate_range(part)));
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

/// Gives host space to what shows data of the backing file, and to holes if the format wants it so.
Result<> Qcow2Disk::populate_data(GuestRange range) {
  const Geometry& g = image_.geometry;
  while (!range.empty()) {
    IMG_LET(const Mapping run, map_.lookup(range));
    GuestRange part{range.begin, run.length};
    const bool shows = run.kind == ClusterKind::unallocated || run.kind == ClusterKind::reserved;
    if (shows && part.begin.bytes() < backing_size_) {
      IMG_LET(const BelowRun below, run_below(*backing_, backing_size_, part, g.subcluster_size));
      part.length = below.length;
      IMG_TRY(below.zero && g.has_zero_flag() ? make_zero(part) : populate_range(part));
    }
    range = {part.end(), range.length - part.length};
  }
  return {};
}

/// Entries of whole subclusters, none of them compressed, come to say that there are zeros.
Result<> Qcow2Disk::make_zero(GuestRange range) {
  const uint64_t coverage = image_.geometry.slice_coverage();
  range = round_out(range, image_.geometry.subcluster_size);  // the end of the disk may cut the last one
  while (!range.empty()) {
    IMG_LET(const TableCache::Pin slice, map_.writable_slice(range.begin));
    const GuestRange part{range.begin, std::min(range.length, coverage - range.begin.bytes() % coverage)};
    map_.zero(slice, part, true);
    range = {part.end(), range.length - part.length};
  }
  return {};
}

/// Gives a run host clusters of its own; returns how many bytes of it are done.
Result<uint64_t> Qcow2Disk::populate_run(const Mapping& mapping, GuestRange range) {
  const Geometry& g = image_.geometry;
  if (raw_data_) IMG_TRY(link_raw_data(round_out(range, g.subcluster_size)));
  // An entry that names a place in a data file says nothing of its space.
  if (raw_data_ || (g.l2.data_file && mapping.kind == ClusterKind::normal)) {
    IMG_TRY(data_->allocate(place_in_data_file(range)));
    return range.length;
  }
  if (mapping.kind == ClusterKind::compressed || mapping.kind == ClusterKind::normal ||
      mapping.kind == ClusterKind::zero_allocated)
    return range.length;
  const uint64_t disk_end = do_size();
  const GuestRange clusters = round_out(range, g.cluster_size);
  const bool whole =
      clusters.begin == range.begin && (clusters.end() == range.end() || range.end().bytes() == disk_end);
  const bool links_zero = reads_zero(mapping, range) && g.has_zero_flag() && whole;
  if (!links_zero || mapping.kind == ClusterKind::reserved) {
    Buffer content(std::min<uint64_t>(range.length, g.cluster_size));
    IMG_TRY(read_range(range.begin, content.bytes()));
    IMG_LET(const WriteRun run, map_.plan_write({range.begin, content.bytes().size()}));
    IMG_LET(const size_t done, write_run(run, range.begin, content.bytes().first(run.length)));
    return done;
  }
  IMG_LET(const TableCache::Pin slice, map_.writable_slice(range.begin));
  const uint64_t in_slice = g.slice_coverage() - clusters.begin.bytes() % g.slice_coverage();
  IMG_LET(Reservation reservation, reserve_for({clusters.begin, std::min(clusters.length, in_slice)}));
  const uint64_t length = reservation.clusters() << g.cluster_bits;
  IMG_TRY(data_->allocate({reservation.host(), length}));
  map_.link_zero(slice, {clusters.begin, length}, reservation.host());
  reservation.commit();
  return std::min(length, range.length);
}

}  // namespace imgfuse::qcow2
