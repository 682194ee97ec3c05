#include "format/qcow2/compressed.h"

#include <algorithm>
#include <cassert>

namespace imgfuse::qcow2 {

PackedReservation::PackedReservation(PackedReservation&& other) noexcept
    : allocator_(other.allocator_),
      image_(other.image_),
      streams_(std::move(other.streams_)),
      clusters_(std::exchange(other.clusters_, {})),
      slices_(std::move(other.slices_)) {}

PackedReservation::~PackedReservation() {
  if (clusters_.empty()) return;
  ExclusiveLock lock(image_->mutex);
  for (const uint64_t cluster : clusters_) allocator_->cancel(slice_of(cluster), cluster);
}

const Refcounts::Slice& PackedReservation::slice_of(uint64_t cluster) const {
  const auto found = std::find_if(slices_.begin(), slices_.end(), [&](const Refcounts::Slice& slice) {
    return slice.first <= cluster && cluster < slice.first + slice.count;
  });
  assert(found != slices_.end());
  return *found;
}

Result<PackedReservation> Packer::reserve(std::span<const uint64_t> lengths) {
  Lock packing(mutex_);
  IMG_LET(const uint64_t end, allocator_.end_limit());
  const uint32_t cluster_bits = image_.geometry.cluster_bits;
  const uint64_t limit = std::min(end, compressed_limit(cluster_bits) >> cluster_bits);
  PackedReservation packed(allocator_, image_);
  for (const uint64_t length : lengths) {
    IMG_LET(const bool appended, append(packed, length, limit));
    if (!appended) IMG_TRY(begin_cluster(packed, length, limit));
  }
  return packed;
}

/// Pins the counts of `cluster`; false where there are none.
Result<bool> Packer::load_counts(PackedReservation& packed, uint64_t cluster) {
  for (const Refcounts::Slice& slice : packed.slices_)
    if (slice.first <= cluster && cluster < slice.first + slice.count) return true;
  IMG_LET(Refcounts::Slice slice, refcounts_.slice_of(cluster));
  if (!slice.pin) return false;
  packed.slices_.push_back(std::move(slice));
  return true;
}

/// Behind the last stream; false if that is not possible.
Result<bool> Packer::append(PackedReservation& packed, uint64_t length, uint64_t limit) {
  const Geometry& g = image_.geometry;
  HostOffset at;
  {
    SharedLock lock(image_.mutex);
    at = image_.next_packed;
  }
  if (at.bytes() == 0) return false;
  const uint64_t first = g.cluster_of(at);
  const uint64_t last = g.cluster_of(at + (length - 1));
  for (uint64_t cluster = first; cluster <= last; ++cluster) {
    IMG_LET(const bool counted, load_counts(packed, cluster));
    if (!counted) return false;
  }

  ExclusiveLock lock(image_.mutex);
  if (image_.next_packed != at) return false;  // the cluster was freed meanwhile
  const Refcounts::Slice& counts = packed.slice_of(first);
  const uint64_t count = refcounts_.get(counts, first);
  if (count == g.max_refcount()) return false;
  if (last != first && !allocator_.take(packed.slice_of(last), last, limit)) return false;
  refcounts_.set(counts, first, count + 1);
  add(packed, {at, length});
  return true;
}

Result<> Packer::begin_cluster(PackedReservation& packed, uint64_t length, uint64_t limit) {
  const Geometry& g = image_.geometry;
  IMG_LET(Reservation cluster, allocator_.reserve(1));
  const uint64_t number = g.cluster_of(cluster.host());
  if (number >= limit)
    return fail(ErrorCode::no_space, "compressed clusters must lie below {:#x}, where no cluster is free",
                limit << g.cluster_bits);
  IMG_TRY(load_counts(packed, number));
  ExclusiveLock lock(image_.mutex);
  add(packed, {cluster.host(), length});
  cluster.commit();
  return {};
}

/// The references are counted.
void Packer::add(PackedReservation& packed, CompressedRange stream) {
  const Geometry& g = image_.geometry;
  const HostOffset end = stream.offset + stream.length;
  for (uint64_t cluster = g.cluster_of(stream.offset); cluster <= g.cluster_of(end - 1); ++cluster)
    packed.clusters_.push_back(cluster);
  packed.streams_.push_back(stream);
  image_.next_packed = end.bytes() % g.cluster_size == 0 ? HostOffset(0) : end;
}

}  // namespace imgfuse::qcow2
