// Host space for compressed clusters: streams of any length, one behind the other, several in a host cluster.
#pragma once

#include <span>
#include <vector>

#include "format/qcow2/allocator.h"
#include "format/qcow2/image.h"
#include "format/qcow2/l2_entry.h"
#include "format/qcow2/refcounts.h"

namespace imgfuse::qcow2 {

/// Places for streams that nothing points at yet. Each stream has one reference on every host cluster that it touches.
/// Destroyed without commit(), the references are given back at once; the bytes stay unused until their cluster is
/// free.
class [[nodiscard]] PackedReservation {
 public:
  explicit PackedReservation(Allocator& allocator, Image& image) : allocator_(&allocator), image_(&image) {}
  PackedReservation(PackedReservation&& other) noexcept;
  PackedReservation& operator=(PackedReservation&&) = delete;
  ~PackedReservation();

  /// One for each stream, in order.
  std::span<const CompressedRange> streams() const { return streams_; }
  /// Something points at them from here on.
  void commit() { clusters_.clear(); }

 private:
  friend class Packer;
  const Refcounts::Slice& slice_of(uint64_t cluster) const;

  Allocator* allocator_;
  Image* image_;
  std::vector<CompressedRange> streams_;
  std::vector<uint64_t> clusters_;        // once for each reference
  std::vector<Refcounts::Slice> slices_;  // pinned: giving references back must not need I/O
};

/// Hands out the bytes behind the last stream (Image::next_packed) as long as its host cluster can take one more
/// reference, across the cluster's border if the next one is free, and otherwise those of a new cluster. Bytes are
/// handed out once in the life of a host cluster, so no stream is ever written over (I4).
///
/// Any thread may call. One at a time (rank 2, held across the I/O that loads or makes a refcount block).
class Packer {
 public:
  Packer(Image& image, Refcounts& refcounts, Allocator& allocator)
      : image_(image), refcounts_(refcounts), allocator_(allocator) {}

  /// Places for streams of these lengths, each shorter than a cluster; neighbours where that is possible. Blocks.
  Result<PackedReservation> reserve(std::span<const uint64_t> lengths) EXCLUDES(mutex_);

 private:
  Result<bool> append(PackedReservation& packed, uint64_t length, uint64_t limit) REQUIRES(mutex_);
  Result<> begin_cluster(PackedReservation& packed, uint64_t length, uint64_t limit) REQUIRES(mutex_);
  Result<bool> load_counts(PackedReservation& packed, uint64_t cluster);
  void add(PackedReservation& packed, CompressedRange stream) REQUIRES(image_.mutex);

  Image& image_;
  Refcounts& refcounts_;
  Allocator& allocator_;
  Mutex mutex_{LockRank::tables};
};

}  // namespace imgfuse::qcow2
