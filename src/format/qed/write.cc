// How guest writes, zeroes and preallocation change an image.
#include <algorithm>
#include <array>

#include "base/buffer.h"
#include "core/host_space.h"
#include "core/pieces.h"
#include "format/qed/qed_disk.h"

namespace imgfuse::qed {
namespace {

/// Longest piece of a zeroing or populating request that holds its lease at once, but for larger clusters.
constexpr uint64_t kPiece = 256 << 20;
/// Clusters may have 64 MiB: what has to be copied into a new one goes through this much memory.
constexpr uint64_t kCopyBytes = 1 << 20;

}  // namespace

Result<> QedDisk::do_write(GuestOffset offset, ConstBytes data) {
  IMG_TRY(latch_.check());
  if (read_only_) return fail(ErrorCode::read_only, "{} is open read-only", storage_->info().name);
  {
    const auto lease = ranges_.shared({offset, data.size()});
    IMG_LET(const size_t written, note(write_in_place(offset, data)));
    if (written == data.size()) return {};
    offset = offset + written;
    data = data.subspan(written);
  }
  {
    const auto lease = ranges_.exclusive(round_out({offset, data.size()}, image_.geometry.cluster_size));
    IMG_TRY(note(write_runs(offset, data)));
  }
  return relieve();
}

/// Writes the leading runs that have their clusters.
Result<size_t> QedDisk::write_in_place(GuestOffset offset, ConstBytes data) {
  size_t written = 0;
  while (written < data.size()) {
    IMG_LET(const Mapping run, map_.lookup({offset + written, data.size() - written}));
    if (run.kind != ClusterKind::data) break;
    IMG_TRY(storage_->write(run.host, data.subspan(written, run.length)));
    written += run.length;
  }
  return written;
}

/// Writes under an exclusive lease.
Result<> QedDisk::write_runs(GuestOffset offset, ConstBytes data) {
  while (!data.empty()) {
    IMG_LET(const Mapping run, map_.lookup({offset, data.size()}));
    size_t done = run.length;
    if (run.kind == ClusterKind::data) {
      IMG_TRY(storage_->write(run.host, data.first(run.length)));
    } else {
      IMG_LET(done, write_new_clusters(run, offset, data.first(run.length)));
    }
    offset = offset + done;
    data = data.subspan(done);
  }
  return {};
}

/// The table that a change goes to; the image says that it needs a check.
Result<TableCache::Pin> QedDisk::begin_change(GuestOffset guest) {
  idle_timer_.touch();
  IMG_TRY(need_check_.set());
  return map_.writable_slice(guest);
}

/// Gives clusters of one kind, none of them data, their own place, with what they read as around the data. Returns how
/// much of it is written.
Result<size_t> QedDisk::write_new_clusters(const Mapping& old, GuestOffset offset, ConstBytes data) {
  const Geometry& g = image_.geometry;
  const uint64_t room = g.slice_coverage() - offset.bytes() % g.slice_coverage();
  data = data.first(std::min<uint64_t>(data.size(), room));
  const GuestRange clusters = round_out({offset, data.size()}, g.cluster_size);
  IMG_LET(const TableCache::Pin slice, begin_change(offset));
  IMG_LET(Reservation reservation, allocator_.reserve(clusters.length));

  // New clusters read as zeros already, and so may what they replace: the backing file must not show in a zero cluster.
  if (reads_zero(old, clusters)) {
    IMG_TRY(storage_->write(reservation.host() + (offset - clusters.begin), data));
  } else {
    IMG_TRY(write_with_surroundings(clusters, reservation.host(), offset, data));
  }
  map_.link(slice, clusters, reservation.host());
  reservation.commit();
  return data.size();
}

/// Fills the clusters at `host`: the data, and around them what the disk reads as.
Result<> QedDisk::write_with_surroundings(GuestRange clusters, HostOffset host, GuestOffset offset, ConstBytes data) {
  const GuestRange head{clusters.begin, offset - clusters.begin};
  const GuestRange tail{offset + data.size(), clusters.end() - (offset + data.size())};
  if (head.length + tail.length > kCopyBytes) {
    IMG_TRY(copy(head, host));
    IMG_TRY(storage_->write(host + head.length, data));
    return copy(tail, host + head.length + data.size());
  }
  const Bytes around = scratch(head.length + tail.length);
  IMG_TRY(read_range(head.begin, around.first(head.length)));
  IMG_TRY(read_range(tail.begin, around.subspan(head.length)));
  return storage_->write(host, std::array<ConstBytes, 3>{around.first(head.length), data, around.subspan(head.length)});
}

/// Copies what the range reads as to `host`.
Result<> QedDisk::copy(GuestRange range, HostOffset host) {
  while (!range.empty()) {
    const Bytes piece = scratch(std::min(range.length, kCopyBytes));
    IMG_TRY(read_range(range.begin, piece));
    IMG_TRY(storage_->write(host, piece));
    range = {range.begin + piece.size(), range.length - piece.size()};
    host = host + piece.size();
  }
  return {};
}

// ---- Zeroing

/// Calls `piece` for bounded parts of the range, under an exclusive lease on their clusters.
template <class Piece>
Result<> QedDisk::in_pieces(GuestRange range, Piece piece) {
  const uint64_t longest = std::max(kPiece, image_.geometry.cluster_size);
  while (!range.empty()) {
    IMG_TRY(latch_.check());
    const GuestRange part{range.begin, std::min(range.length, longest - range.begin.bytes() % longest)};
    {
      const auto lease = ranges_.exclusive(round_out(part, image_.geometry.cluster_size));
      IMG_TRY(note(piece(part)));
    }
    IMG_TRY(relieve());
    range = {part.end(), range.length - part.length};
  }
  return {};
}

Result<> QedDisk::do_write_zeroes(GuestRange range, Zeroing zeroing) {
  return in_pieces(range, [&](GuestRange part) { return zero_range(part, zeroing); });
}

Result<> QedDisk::zero_range(GuestRange range, Zeroing zeroing) {
  // The cluster that the end of the disk cuts counts as whole.
  if (range.end().bytes() == do_size())
    range.length = round_out(range, image_.geometry.cluster_size).end() - range.begin;
  const Pieces pieces = split(range, image_.geometry.cluster_size);
  IMG_TRY(zero_part(pieces.head));
  IMG_TRY(zero_clusters(pieces.whole, zeroing));
  return zero_part(pieces.tail);
}

/// Part of one cluster. No hole is punched: it could cut a sector, of which a crash leaves the old or the new.
Result<> QedDisk::zero_part(GuestRange range) {
  if (range.empty()) return {};
  IMG_LET(const Mapping run, map_.lookup(range));
  if (reads_zero(run, range)) return {};
  if (run.kind == ClusterKind::data) return storage_->write_zeroes({run.host, range.length});
  for (uint64_t done = 0; done < range.length; done += kZeroesSize)
    IMG_TRY(write_runs(range.begin + done, zeroes(std::min(range.length - done, kZeroesSize))));
  return {};
}

/// A cluster that has its place keeps it: QED cannot use it again. Its host space may go.
Result<> QedDisk::zero_clusters(GuestRange range, Zeroing zeroing) {
  while (!range.empty()) {
    IMG_LET(const Mapping run, map_.lookup(range));
    GuestRange part{range.begin, run.length};
    if (run.kind == ClusterKind::data) {
      const HostRange place{run.host, run.length};
      IMG_TRY(zeroing == Zeroing::may_free ? zero_and_free(*storage_, place) : storage_->write_zeroes(place));
    } else if (!reads_zero(run, part)) {
      const uint64_t coverage = image_.geometry.slice_coverage();
      part.length = std::min(part.length, coverage - part.begin.bytes() % coverage);
      IMG_LET(const TableCache::Pin slice, begin_change(part.begin));
      map_.link_zero(slice, part);
    }
    range = {part.end(), range.length - part.length};
  }
  return {};
}

// ---- Forgetting and populating

/// The layer below shows again in all of the range or in nothing, so what is here stays: QED could not use its place
/// again.
Result<> QedDisk::do_forget(GuestRange) {
  return fail(ErrorCode::unsupported, "{} is a QED image, whose clusters cannot be taken back", storage_->info().name);
}

Result<> QedDisk::do_populate(GuestRange range, Holes holes) {
  return in_pieces(range, [&](GuestRange part) { return populate_range(part, holes); });
}

Result<> QedDisk::populate_range(GuestRange range, Holes holes) {
  const Geometry& g = image_.geometry;
  range = round_out(range, g.cluster_size);
  while (!range.empty()) {
    IMG_LET(const Mapping run, map_.lookup(range));
    GuestRange part{range.begin, run.length};
    const bool zero = reads_zero(run, part);
    if (run.kind != ClusterKind::data && !(zero && holes == Holes::keep)) {
      part.length = std::min(part.length, g.slice_coverage() - part.begin.bytes() % g.slice_coverage());
      BelowRun below{part.length};
      if (holes == Holes::keep) {
        IMG_LET(below, run_below(*backing_, backing_size_, part, g.cluster_size));
      }
      part.length = below.length;
      IMG_LET(const TableCache::Pin slice, begin_change(part.begin));
      if (below.zero) {
        map_.link_zero(slice, part);
      } else {
        IMG_TRY(populate_clusters(slice, part, zero));
      }
    }
    range = {part.end(), range.length - part.length};
  }
  return {};
}

/// Gives clusters that are not data their own place, with what they read as.
Result<> QedDisk::populate_clusters(const TableCache::Pin& slice, GuestRange range, bool zero) {
  IMG_LET(Reservation reservation, allocator_.reserve(range.length));
  IMG_TRY(storage_->allocate(reservation.range()));
  if (!zero) IMG_TRY(copy(range, reservation.host()));
  map_.link(slice, range, reservation.host());
  reservation.commit();
  return {};
}

}  // namespace imgfuse::qed
