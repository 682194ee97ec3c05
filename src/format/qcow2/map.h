// From guest clusters to host clusters: the L1 table and its L2 tables.
#pragma once

#include <atomic>
#include <span>
#include <vector>

#include "format/qcow2/allocator.h"
#include "format/qcow2/image.h"
#include "format/qcow2/l2_entry.h"

namespace imgfuse::qcow2 {

/// What a run of guest bytes maps to. All bytes of the run are of one kind; the host bytes of a normal or
/// zero-allocated run are contiguous; a compressed run is one cluster.
struct Mapping {
  ClusterKind kind = ClusterKind::unallocated;
  uint64_t length = 0;         ///< guest bytes from the position asked for
  HostOffset host;             ///< of the position asked for (normal, zero-allocated, reserved)
  CompressedRange compressed;  ///< (compressed)
};

/// How a run of guest bytes is to be written: clusters that are this image's alone and neighbours on the host, or
/// clusters that all need new ones. It does not leave a slice.
struct WriteRun {
  uint64_t length = 0;    ///< guest bytes from the position asked for
  bool in_place = false;  ///< else new host clusters are needed
  bool linked = false;    ///< in place, and no entry has to change
  HostOffset host;        ///< of the position asked for (in place)
  /// Bytes before and behind that have to be written too, with what they read as: the rest of subclusters that get host
  /// bytes, and what a new cluster must not lose.
  uint64_t head = 0, tail = 0;
};

/// What a new entry lets a reader find.
enum class Shows {
  bytes,  ///< written before it: they have to be durable first (I2)
  zeros,  ///< until what was written there is durable, and that is what the guest read there before
};

/// Looks guest clusters up and changes what they map to. A mapping is valid under the guest-range lease under which it
/// was looked up. Any thread; lookup() and writable_slice() may block to load a table.
class Map {
 public:
  Map(Image& image, Allocator& allocator) : image_(image), allocator_(allocator) {}

  /// Reads the L1 table. For a writable image the tables must not overlap other metadata, or it is not opened.
  Result<> load(const Header& header, bool writable);

  /// The run at the front of `range` (not empty; may stop early at the border of a slice).
  Result<Mapping> lookup(GuestRange range);

  /// How to write the front of `range` (not empty).
  Result<WriteRun> plan_write(GuestRange range);

  /// A slice of an L2 table that may be changed: made, or copied from a table shared with a snapshot, if need be.
  Result<TableCache::Pin> writable_slice(GuestOffset guest) EXCLUDES(tables_);

  /// Changes of entries, each under an exclusive lease on the clusters around `range` and with the pin that
  /// writable_slice() gave for it. What an entry gives up goes to quarantine. `range` must not leave the slice.
  ///
  /// The range, whole subclusters, lies at `host`.
  void link(const TableCache::Pin& slice, GuestRange range, HostOffset host, Shows shows = Shows::bytes);
  /// As link(), but whole clusters that read as zeros and keep `host` for later.
  void link_zero(const TableCache::Pin& slice, GuestRange range, HostOffset host);
  /// Links one cluster to each compressed stream.
  void link_compressed(const TableCache::Pin& slice, GuestOffset guest, std::span<const CompressedRange> streams);
  /// The range, whole subclusters, reads as zeros; no compressed cluster may be cut. `keep` leaves the host clusters
  /// allocated where the entry can express that.
  void zero(const TableCache::Pin& slice, GuestRange range, bool keep);
  /// Whole clusters read as they would without an entry (from the backing file).
  void unmap(const TableCache::Pin& slice, GuestRange range);

  /// L1 entries changed since the last call, frozen at a cut. Under Image::mutex, exclusive.
  struct L1Changes {
    HostOffset table;
    std::vector<std::pair<uint64_t, uint64_t>> entries;  // index, value; ascending
  };
  L1Changes freeze_l1();
  Result<> write_l1(const L1Changes& changes);
  /// The changes were not written: they are due again.
  void keep_l1(const L1Changes& changes);

  uint64_t l1_entries() const;
  /// Frees the L2 tables from that L1 entry on, which map nothing.
  void drop_tables_from(uint64_t l1_index);
  /// The end of what the last L2 table maps: nothing is mapped from there on.
  GuestOffset tables_end() const;
  /// The L1 table as it would lie on disk with `entries` entries.
  std::vector<std::byte> encode_l1(uint64_t entries) const;
  /// The L1 table was copied to `offset` with `entries` entries and the header points there: the old one is freed.
  void adopt_l1(HostOffset offset, uint64_t entries);

  /// The entries, and where they lie on disk.
  std::vector<uint64_t> l1_table() const;
  HostRange l1_place() const;
  /// The L1 table at `offset`, with these entries, is the disk's from here on; what the old one led to is the caller's
  /// to free. Under Image::mutex, exclusive; no change may be waiting to be written.
  void replace_l1(HostOffset offset, std::vector<uint64_t> entries);
  /// The disk holds this much, all counted. Under Image::mutex, exclusive.
  void set_allocated(uint64_t bytes);

  /// Guest bytes that hold host clusters, among those counted so far.
  uint64_t allocated() const { return allocated_.load(std::memory_order_relaxed); }
  /// Counts the next slice of the disk; false when all `size` bytes are counted.
  Result<bool> count_next(uint64_t size);

 private:
  struct SlicePlace {
    HostOffset offset;
    uint64_t first_index;  // in the slice, of the guest cluster asked for
  };
  SlicePlace place(L1Entry l1, GuestOffset guest) const;
  Result<L1Entry> l1_entry(GuestOffset guest) const EXCLUDES(image_.mutex);
  Result<L1Entry> l1_entry_locked(GuestOffset guest) const REQUIRES_SHARED(image_.mutex);
  Result<> check_table(L1Entry l1, uint64_t index) const REQUIRES_SHARED(image_.mutex);
  Result<TableCache::Pin> load_slice(L1Entry l1, GuestOffset guest) const EXCLUDES(image_.mutex);
  Result<> check_entry(L2Entry entry, GuestOffset guest) const REQUIRES_SHARED(image_.mutex);
  Result<Mapping> read_run(ConstBytes slice, uint64_t index, GuestRange range) const REQUIRES_SHARED(image_.mutex);
  Result<WriteRun> write_run(ConstBytes slice, uint64_t index, GuestRange range, bool table_copied) const
      REQUIRES_SHARED(image_.mutex);
  /// Calls `look(slice, index, l1)` with the metadata lock shared, or `nothing()` where there is no L2 table.
  template <class Look, class Nothing>
  auto look_up(GuestOffset guest, Look look, Nothing nothing) -> decltype(nothing());
  uint64_t touched(GuestRange range, GuestOffset cluster) const;
  GuestRange around(GuestRange range, L2Entry first, L2Entry last) const;
  Result<> make_table(uint64_t l1_index) EXCLUDES(tables_);
  template <class Change>
  void change(const TableCache::Pin& slice, GuestRange range, HostSpace space, Shows shows, Change&& entry_for);
  void give_up(L2Entry entry, HostSpace space) REQUIRES(image_.mutex);

  Image& image_;
  Allocator& allocator_;

  Mutex tables_{LockRank::tables};  // one L2 table is made at a time; held across I/O
  HostOffset l1_offset_ GUARDED_BY(image_.mutex);
  std::vector<uint64_t> l1_ GUARDED_BY(image_.mutex);
  std::vector<uint64_t> dirty_l1_ GUARDED_BY(image_.mutex);  // indexes
  uint64_t counted_ GUARDED_BY(image_.mutex) = 0;            // guest bytes from 0 that allocated_ covers
  std::atomic<uint64_t> allocated_ = 0;
};

}  // namespace imgfuse::qcow2
