// One qcow2 image as a Disk: how guest requests travel.
#pragma once

#include <atomic>
#include <memory>

#include "base/latch.h"
#include "base/no_wait.h"
#include "core/flusher.h"
#include "core/inflate_pool.h"
#include "core/range_lock.h"
#include "format/qcow2/allocator.h"
#include "format/qcow2/compressed.h"
#include "format/qcow2/dirty_bitmaps.h"
#include "format/qcow2/image.h"
#include "format/qcow2/map.h"
#include "format/qcow2/qcow2.h"
#include "format/qcow2/refcounts.h"
#include "format/qcow2/snapshots.h"

namespace imgfuse::qcow2 {

/// A request takes one lease on its guest range (shared for reading and for writing in place, exclusive for whatever
/// changes a mapping), looks runs up, and does one host call per run. New clusters are reserved, written, then linked;
/// the flush cycle makes counts and tables durable in that order.
class Qcow2Disk final : public Disk, private Flusher::Client {
 public:
  Qcow2Disk(std::shared_ptr<Storage> storage, Header header, OpenParameters parameters);
  ~Qcow2Disk() override;

  /// Reads the tables, opens the files that the image names, and prepares a writable image for its first change.
  Result<> start(const BackingOpener& open_backing, const DataFileOpener& open_data_file);

  Snapshots* snapshots() override { return snapshots_.get(); }
  Bitmaps* bitmaps() override { return snapshots_ ? &bitmaps_ : nullptr; }  // they are the active disk's
  int share_host_file() override;

  DiskStatistics statistics() const override;

 private:
  friend class Qcow2Snapshots;

  DiskInfo do_info() const override;
  uint64_t do_size() const override { return size_.load(std::memory_order_relaxed); }
  Result<> do_read(GuestOffset offset, Bytes out) override;
  Result<> do_write(GuestOffset offset, ConstBytes data) override;
  Result<> do_write_zeroes(GuestRange range, Zeroing zeroing) override;
  Result<> do_populate(GuestRange range, Holes holes) override;
  Result<> do_forget(GuestRange range) override;
  Result<std::vector<Extent>> do_map(GuestRange range, size_t max_extents) override;
  Result<> do_flush() override;
  Result<> do_resize(uint64_t size, ResizeOptions options) override;
  Result<> do_close() override;
  uint64_t do_allocated() const override;
  Result<> do_count_allocated(const std::atomic<bool>& stop) override;

  void cut() override;
  Result<bool> write_stage(unsigned stage) override;
  bool needs_barrier(unsigned stage) const override;
  void end_cycle(bool durable) override;

  class Strict;
  struct EncodedCluster;
  class Encoder;
  Result<> write_plain(GuestOffset offset, ConstBytes data);
  Result<> write_compressed(GuestOffset offset, ConstBytes data);

  // All of these expect a lease on the range.
  Result<> read_range(GuestOffset offset, Bytes out);
  struct CompressedPiece;
  Result<> read_compressed(std::span<const CompressedPiece> pieces);
  Result<> read_piece(const CompressedPiece& piece);
  Result<> inflate(CompressedRange stream, GuestOffset guest, Bytes cluster);
  void inflate_ahead(GuestOffset guest);
  Result<> write_runs(GuestOffset offset, ConstBytes data);
  Result<size_t> write_in_place(GuestOffset offset, ConstBytes data);
  Result<size_t> write_run(const WriteRun& run, GuestOffset offset, ConstBytes data);
  Result<Reservation> reserve(uint64_t clusters);
  Result<Reservation> reserve_for(GuestRange clusters);
  Result<size_t> write_new_clusters(const TableCache::Pin& slice, const WriteRun& run, GuestOffset offset,
                                    ConstBytes data);
  Result<> write_around(GuestRange filled, HostOffset host, GuestOffset offset, ConstBytes data, bool host_is_zero);
  Result<> write_clusters(GuestOffset offset, std::span<const EncodedCluster> clusters);
  Result<> write_streams(GuestOffset guest, std::span<const EncodedCluster> streams);
  Result<PackedReservation> reserve_packed(std::span<const EncodedCluster> streams);
  Result<> zero_range(GuestRange range, Zeroing zeroing);
  Result<> zero_part(GuestRange range);
  Result<> zero_subclusters(GuestRange range, Zeroing zeroing);
  Result<uint64_t> zero_run(const Mapping& mapping, GuestRange range, Zeroing zeroing);
  Result<> zero_raw_data(GuestRange range, Zeroing zeroing);
  Result<> link_raw_data(GuestRange range);
  Result<> overwrite_with_zeroes(GuestRange range);
  Result<> forget_clusters(GuestRange range);
  Result<> populate_range(GuestRange range);
  Result<> populate_data(GuestRange range);
  Result<> make_zero(GuestRange range);
  Result<uint64_t> populate_run(const Mapping& mapping, GuestRange range);

  bool reads_zero(const Mapping& mapping, GuestRange range) const;
  Result<bool> reads_zero(GuestRange range);
  Result<> relieve();
  template <class R>
  R note(R result);
  Result<> mark_corrupt();
  Result<> flush_counts();
  Result<> write_out();
  Result<> clear_autoclear_bits();
  Result<> open_data(const DataFileOpener& open_data_file);
  Result<bool> is_linked(GuestRange range);
  Result<> grow(uint64_t old_size, uint64_t size, Preallocation preallocation);
  Result<> shrink(uint64_t size);
  Result<> fill_with_zeroes(GuestRange range);
  Result<> grow_l1(uint64_t entries);
  Result<> write_size(uint64_t size);

  std::shared_ptr<Storage> storage_;
  std::shared_ptr<Storage> data_;  // where guest data lies: the image file or a DataFile
  Header header_;                  // as opened, with the snapshots of today; other fields that change live elsewhere
  const bool raw_data_;            // the data file reads as the disk does, at any moment
  const bool read_only_;
  const bool compress_;  // whole clusters that the guest writes
  const bool lazy_;      // counts may be postponed while the dirty bit is set
  std::atomic<uint64_t> size_;
  std::unique_ptr<Disk> backing_;
  std::shared_ptr<const void> hold_;  // see OpenParameters
  uint64_t backing_size_ = 0;
  std::atomic<bool> marked_corrupt_ = false;
  bool closed_ = true;  // nothing to write out: false from start() to close() of a writable image
  std::atomic<bool> counted_ = false;

  std::atomic<unsigned> strict_ = 0;         // cycles write counts first as long as it is not 0: see Strict
  std::atomic<bool> counts_wanted_ = false;  // by the next cycle
  Latch latch_;
  RangeLock ranges_;
  Image image_;
  Refcounts refcounts_;
  Allocator allocator_;
  DirtyBitmaps bitmaps_;
  Packer packer_;
  Map map_;
  Flusher flusher_;
  std::unique_ptr<Qcow2Snapshots> snapshots_;  // null when this disk is one
  InflatePool inflaters_;

  // One flush cycle's work, from cut() to end_cycle(); touched by its one thread only.
  struct Cycle {
    TableCache::Batch counts, slices;
    Map::L1Changes l1;
    bool lazy = false;         // counts may be written behind what relies on them, once the dirty bit is durable
    bool marks_dirty = false;  // that is not so yet
    bool shows_bytes = false;  // data first
    bool counts_first = false;
    Allocator::Run ahead;  // among the counts
    uint64_t file_size = 0;
    Allocator::Freed freed;
  } cycle_;
};

/// A compressed cluster that is to be read, or a part of it.
struct Qcow2Disk::CompressedPiece {
  CompressedRange stream;
  GuestOffset offset;
  Bytes out;
};

/// While it lives, flush cycles write counts before what relies on them, and none ahead of need. write_out() then takes
/// the dirty bit off, and back what was counted ahead.
class Qcow2Disk::Strict {
 public:
  explicit Strict(Qcow2Disk& disk) : disk_(disk) {
    ++disk_.strict_;
    disk_.allocator_.pause_counts_ahead();
  }
  ~Strict() {
    disk_.allocator_.resume_counts_ahead();
    --disk_.strict_;
  }
  Strict(const Strict&) = delete;
  Strict& operator=(const Strict&) = delete;

 private:
  Qcow2Disk& disk_;
};

/// Ends a request: one that met damaged metadata ends all writing.
template <class R>
R Qcow2Disk::note(R result) {
  if (result || would_wait(result) || !image_.damaged || read_only_) return result;
  if (marked_corrupt_.exchange(true)) return result;
  const Result<> marked = mark_corrupt();
  latch_.set(marked ? result.error() : marked.error());
  return result;
}

}  // namespace imgfuse::qcow2
