// What the parts of one open QED image share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "base/math.h"
#include "base/mutex.h"
#include "core/table_cache.h"
#include "format/qed/header.h"
#include "imgfuse/storage.h"

namespace imgfuse::qed {

/// Sizes that follow from the header and never change while the image is open.
struct Geometry {
  explicit Geometry(const Header& header)
      : cluster_size(header.cluster_size),
        table_bytes(header.table_bytes()),
        table_entries(header.table_entries()),
        coverage(header.coverage()) {}

  /// Unit of caching and writing of L2 tables, which may have 1 GiB. The smallest table is as long.
  static constexpr uint64_t kSliceBytes = 4096;
  static constexpr uint64_t kSliceEntries = kSliceBytes / 8;

  uint64_t cluster_size;
  uint64_t table_bytes;
  uint64_t table_entries;
  uint64_t coverage;  ///< guest bytes per L2 table

  uint64_t l1_index(GuestOffset guest) const { return guest.bytes() / coverage; }
  /// In its L2 table.
  uint64_t l2_index(GuestOffset guest) const { return guest.bytes() / cluster_size % table_entries; }
  uint64_t slice_coverage() const { return kSliceEntries * cluster_size; }
};

/// Stages of a flush cycle: data and new clusters were written before the cut, so the first has only its barrier; then
/// what points at them.
inline constexpr unsigned kMapStage = 1;

/// Where the tables lie, so that no data entry is believed that points into one. Guarded by Image::mutex.
class TablePlaces {
 public:
  explicit TablePlaces(uint64_t table_bytes) : table_bytes_(table_bytes) {}

  /// Returns whether it lies apart from all others. New tables lie behind the others, so this is cheap for them.
  bool add(HostOffset table) {
    const auto at = std::lower_bound(tables_.begin(), tables_.end(), table);
    if (at != tables_.end() && *at - table < table_bytes_) return false;
    if (at != tables_.begin() && table - *(at - 1) < table_bytes_) return false;
    tables_.insert(at, table);
    return true;
  }
  /// Adds many at once; returns one that overlaps another, else 0 (the header's place).
  HostOffset add_all(const std::vector<HostOffset>& tables) {
    tables_.insert(tables_.end(), tables.begin(), tables.end());
    std::sort(tables_.begin(), tables_.end());
    for (size_t i = 1; i < tables_.size(); ++i)
      if (tables_[i] - tables_[i - 1] < table_bytes_) return tables_[i];
    return HostOffset(0);
  }
  bool contains(HostOffset host) const {
    const auto next = std::upper_bound(tables_.begin(), tables_.end(), host);
    return next != tables_.begin() && host - *(next - 1) < table_bytes_;
  }

 private:
  const uint64_t table_bytes_;
  std::vector<HostOffset> tables_;  // sorted
};

/// The shared state. `mutex` (rank 5) guards the content of all cached tables and what Map keeps in memory; it is never
/// held during I/O.
struct Image {
  Image(Storage& image_storage, const Header& image_header, uint64_t metadata_cache)
      : storage(image_storage),
        header(image_header),
        geometry(image_header),
        tables(image_storage, Geometry::kSliceBytes, metadata_cache),
        places(geometry.table_bytes) {}

  Storage& storage;
  const Header header;  ///< as opened; what changes lives elsewhere
  const Geometry geometry;
  TableCache tables;
  SharedMutex mutex{LockRank::metadata};
  TablePlaces places GUARDED_BY(mutex);
  /// End of the file, in whole clusters: nothing may point there or behind it. Set by the allocator.
  std::atomic<uint64_t> end = 0;
  /// Metadata was met that cannot be: see QedDisk::note().
  std::atomic<bool> damaged = false;
};

}  // namespace imgfuse::qed
