// From guest clusters to host clusters: the L1 table and its L2 tables.
#pragma once

#include <atomic>
#include <utility>
#include <vector>

#include "format/qed/allocator.h"
#include "format/qed/image.h"

namespace imgfuse::qed {

/// What L2 entries say, besides host offsets. An L1 entry is 0, for no table, or the table's offset.
inline constexpr uint64_t kUnallocated = 0;
inline constexpr uint64_t kZeroCluster = 1;

enum class ClusterKind { unallocated, zero, data };

/// What a run of guest bytes maps to. All bytes are of one kind, and those of a data run contiguous on the host.
struct Mapping {
  ClusterKind kind = ClusterKind::unallocated;
  uint64_t length = 0;  ///< guest bytes from the position asked for
  HostOffset host;      ///< of the position asked for (data)
};

/// Looks guest clusters up and changes what they map to. A mapping is valid under the guest-range lease under which it
/// was looked up; host clusters never move, and none is taken away. Any thread; lookup() and writable_slice() may block
/// to load a table.
class Map {
 public:
  Map(Image& image, Allocator& allocator) : image_(image), allocator_(allocator) {}

  /// Reads as much of the L1 table as the disk needs. For a writable image every table must lie where one may lie, and
  /// apart from the others, or it is not opened.
  Result<> load(bool writable);
  /// The same for the part that a larger disk needs.
  Result<> load_more(uint64_t image_size);

  /// The run at the front of `range` (not empty; may stop early at the border of a slice).
  Result<Mapping> lookup(GuestRange range);

  /// A slice of an L2 table, which is made if need be.
  Result<TableCache::Pin> writable_slice(GuestOffset guest) EXCLUDES(tables_);

  /// Points the whole clusters of `range` at `host`; under an exclusive lease on them, and with the pin that
  /// writable_slice() gave for them. They must not leave the slice.
  void link(const TableCache::Pin& slice, GuestRange range, HostOffset host);
  /// The same for clusters that have no host cluster: they read as zeros.
  void link_zero(const TableCache::Pin& slice, GuestRange range);

  /// L1 entries changed since the last call, frozen at a cut. Under Image::mutex, exclusive.
  using L1Changes = std::vector<std::pair<uint64_t, uint64_t>>;  // index, value; ascending
  L1Changes freeze_l1();
  Result<> write_l1(const L1Changes& changes);
  /// The changes were not written: they are due again.
  void keep_l1(const L1Changes& changes);

  /// The end of what the last L2 table maps: nothing is mapped from there on.
  GuestOffset tables_end() const;

  /// Guest bytes that hold host clusters, among those counted so far.
  uint64_t allocated() const { return allocated_.load(std::memory_order_relaxed); }
  /// Counts the next slice of the disk; false when all `size` bytes are counted.
  Result<bool> count_next(uint64_t size);

 private:
  uint64_t l1_entry(uint64_t index) const EXCLUDES(image_.mutex);
  Result<> check_table(uint64_t entry, uint64_t index) const;
  Result<> check_entry(uint64_t entry, GuestOffset guest) const REQUIRES_SHARED(image_.mutex);
  HostOffset slice_place(uint64_t table, GuestOffset guest) const;
  Result<Mapping> read_run(ConstBytes slice, GuestRange range) const REQUIRES_SHARED(image_.mutex);
  Result<uint64_t> make_table(uint64_t l1_index) EXCLUDES(tables_);
  template <class EntryFor>
  void change(const TableCache::Pin& slice, GuestRange range, EntryFor entry_for);

  Image& image_;
  Allocator& allocator_;

  Mutex tables_{LockRank::tables};  // one L2 table is made at a time; held while the file grows
  std::vector<uint64_t> l1_ GUARDED_BY(image_.mutex);
  std::vector<uint64_t> dirty_l1_ GUARDED_BY(image_.mutex);  // indexes
  uint64_t counted_ GUARDED_BY(image_.mutex) = 0;            // guest bytes from 0 that allocated_ covers
  std::atomic<uint64_t> allocated_ = 0;
};

}  // namespace imgfuse::qed
