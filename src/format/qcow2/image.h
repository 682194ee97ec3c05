// What the parts of one open qcow2 image share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <numeric>
#include <utility>
#include <vector>

#include "base/math.h"
#include "base/mutex.h"
#include "core/cluster_cache.h"
#include "core/table_cache.h"
#include "format/qcow2/header.h"
#include "format/qcow2/header_writer.h"
#include "imgfuse/storage.h"

namespace imgfuse::qcow2 {

/// Sizes that follow from the header and never change while the image is open.
struct Geometry {
  explicit Geometry(const Header& header)
      : version(header.version),
        cluster_bits(header.cluster_bits),
        cluster_size(header.cluster_size()),
        l2_entries(header.l2_entries()),
        l2_coverage(header.l2_coverage()),
        slice_bytes(std::min<uint64_t>(header.cluster_size(), 4096)),
        refcount_bits(1u << header.refcount_order),
        refcounts_per_block(header.refcounts_per_block()),
        subcluster_size(header.cluster_size() / header.l2_format().subclusters()),
        l2(header.l2_format()),
        compression(header.compression) {}

  uint32_t version;
  uint32_t cluster_bits;
  uint64_t cluster_size;
  uint64_t l2_entries;   ///< per L2 table
  uint64_t l2_coverage;  ///< guest bytes per L2 table
  uint64_t slice_bytes;  ///< unit of caching and writing of L2 tables and refcount blocks
  uint32_t refcount_bits;
  uint64_t refcounts_per_block;
  uint64_t subcluster_size;  ///< the cluster size without extended L2 entries
  L2Format l2;
  Compression compression;

  bool has_zero_flag() const { return version >= 3; }
  uint64_t max_refcount() const { return ~uint64_t{0} >> (64 - refcount_bits); }
  uint64_t slice_entries() const { return slice_bytes / l2.entry_bytes(); }
  /// Guest bytes mapped by one slice of an L2 table.
  uint64_t slice_coverage() const { return slice_entries() * cluster_size; }
  uint64_t l1_index(GuestOffset guest) const { return guest.bytes() / l2_coverage; }
  uint64_t l2_index(GuestOffset guest) const { return (guest.bytes() >> cluster_bits) % l2_entries; }
  uint64_t cluster_of(HostOffset host) const { return host.bytes() >> cluster_bits; }
  HostOffset host_of(uint64_t cluster) const { return HostOffset(cluster << cluster_bits); }
  uint64_t clusters_for(uint64_t bytes) const { return divide_up(bytes, cluster_size); }
};

/// Stages of a flush cycle: reference counts (and, written before the cut, data), then what points at it.
inline constexpr unsigned kCountStage = 0;
inline constexpr unsigned kMapStage = 1;

/// Host clusters in use by metadata, so that no data entry and no allocation is believed that points into it.
/// Guarded by Image::mutex.
class KnownMetadata {
 public:
  /// Adds neighbouring clusters. A cluster may be known once only: returns whether they were all unknown.
  bool add(uint64_t cluster, uint64_t count = 1) {
    if (overlaps(cluster, count)) {
      std::vector<uint64_t> run(count);
      std::iota(run.begin(), run.end(), cluster);
      add_all(run);
      return false;
    }
    auto at = clusters_.insert(std::lower_bound(clusters_.begin(), clusters_.end(), cluster), count, cluster);
    std::iota(at, at + static_cast<std::ptrdiff_t>(count), cluster);
    return true;
  }
  /// Adds many at once; returns one that was known already or came twice, else 0 (the header's cluster).
  uint64_t add_all(const std::vector<uint64_t>& clusters) {
    clusters_.insert(clusters_.end(), clusters.begin(), clusters.end());
    std::sort(clusters_.begin(), clusters_.end());
    auto twice = std::adjacent_find(clusters_.begin(), clusters_.end());
    const uint64_t duplicate = twice == clusters_.end() ? 0 : *twice;
    clusters_.erase(std::unique(clusters_.begin(), clusters_.end()), clusters_.end());
    return duplicate;
  }
  void remove(uint64_t cluster, uint64_t count = 1) {
    auto first = std::lower_bound(clusters_.begin(), clusters_.end(), cluster);
    auto last = std::lower_bound(first, clusters_.end(), cluster + count);
    clusters_.erase(first, last);
  }
  /// Removes many at once, those that are known. Sorts them.
  void remove_all(std::vector<uint64_t> clusters) {
    std::sort(clusters.begin(), clusters.end());
    std::vector<uint64_t> left;
    std::set_difference(clusters_.begin(), clusters_.end(), clusters.begin(), clusters.end(), std::back_inserter(left));
    clusters_ = std::move(left);
  }
  /// Calls `visit` with each known cluster from `first` to `end`.
  template <class Visit>
  void for_each(uint64_t first, uint64_t end, Visit visit) const {
    for (auto at = std::lower_bound(clusters_.begin(), clusters_.end(), first); at != clusters_.end() && *at < end;
         ++at)
      visit(*at);
  }
  bool overlaps(uint64_t cluster, uint64_t count = 1) const {
    auto at = std::lower_bound(clusters_.begin(), clusters_.end(), cluster);
    return at != clusters_.end() && *at < cluster + count;
  }

 private:
  std::vector<uint64_t> clusters_;  // sorted; grows mostly at its end
};

/// The shared state. `mutex` (rank 5) guards the content of all cached tables, `known`, and what Map, Refcounts and
/// Allocator keep in memory; it is never held during I/O.
struct Image {
  Image(Storage& image_storage, const Header& header, uint64_t metadata_cache, std::shared_ptr<ClusterCache> clusters)
      : storage(image_storage),
        geometry(header),
        header_writer(image_storage, header),
        tables(image_storage, geometry.slice_bytes, metadata_cache),
        inflated(std::move(clusters)) {}

  Storage& storage;
  const Geometry geometry;
  HeaderWriter header_writer;
  TableCache tables;
  SharedMutex mutex{LockRank::metadata};
  /// What compressed clusters inflate to. Their host clusters are dropped here when they become free.
  const ClusterCache::Part inflated;
  KnownMetadata known GUARDED_BY(mutex);
  /// Where the next compressed stream may begin, in a host cluster that holds others already. 0: nowhere.
  HostOffset next_packed GUARDED_BY(mutex);
  /// Since the last cut a table came to show bytes that have to be durable before it is written. See Shows.
  bool shows_bytes GUARDED_BY(mutex) = false;
  /// Since the last cut of counts one was raised that has to be durable before what relies on it.
  bool counts_first GUARDED_BY(mutex) = false;
  /// Metadata was met that cannot be: see Qcow2Disk::note().
  std::atomic<bool> damaged = false;
};

}  // namespace imgfuse::qcow2
