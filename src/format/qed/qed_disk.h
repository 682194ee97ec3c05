// One QED image as a Disk: how guest requests travel.
#pragma once

#include <atomic>
#include <memory>

#include "base/latch.h"
#include "base/no_wait.h"
#include "core/flusher.h"
#include "core/idle_timer.h"
#include "core/range_lock.h"
#include "format/qed/allocator.h"
#include "format/qed/image.h"
#include "format/qed/map.h"
#include "format/qed/need_check.h"
#include "format/qed/qed.h"

namespace imgfuse::qed {

/// A request takes one lease on its guest range (shared for reading and for writing in place, exclusive for whatever
/// changes a mapping), looks runs up, and does one host call per run. New clusters are reserved, written, then linked;
/// the flush cycle makes them durable before the tables.
class QedDisk final : public Disk, private Flusher::Client {
 public:
  QedDisk(std::shared_ptr<Storage> storage, Header header, const OpenParameters& parameters);
  ~QedDisk() override;

  /// Reads the L1 table and opens the backing file.
  Result<> start(const BackingOpener& open_backing);

  DiskStatistics statistics() const override;

 private:
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
  uint64_t do_allocated() const override { return map_.allocated(); }
  Result<> do_count_allocated(const std::atomic<bool>& stop) override;

  void cut() override;
  Result<bool> write_stage(unsigned stage) override;
  void end_cycle(bool durable) override;

  // All of these expect a lease on the range.
  Result<> read_range(GuestOffset offset, Bytes out);
  Result<size_t> write_in_place(GuestOffset offset, ConstBytes data);
  Result<> write_runs(GuestOffset offset, ConstBytes data);
  Result<size_t> write_new_clusters(const Mapping& old, GuestOffset offset, ConstBytes data);
  Result<> write_with_surroundings(GuestRange clusters, HostOffset host, GuestOffset offset, ConstBytes data);
  Result<> copy(GuestRange range, HostOffset host);
  Result<> zero_range(GuestRange range, Zeroing zeroing);
  Result<> zero_part(GuestRange range);
  Result<> zero_clusters(GuestRange range, Zeroing zeroing);
  Result<> populate_range(GuestRange range, Holes holes);
  Result<> populate_clusters(const TableCache::Pin& slice, GuestRange range, bool zero);

  template <class Piece>
  Result<> in_pieces(GuestRange range, Piece piece);
  bool reads_zero(const Mapping& mapping, GuestRange range) const;
  Result<TableCache::Pin> begin_change(GuestOffset guest);
  Result<> relieve();
  Result<> grow(uint64_t old_size, uint64_t size);
  void idle();
  Result<> write_out();
  template <class R>
  R note(R result);

  std::shared_ptr<Storage> storage_;
  const bool read_only_;
  std::atomic<uint64_t> size_;
  std::unique_ptr<Disk> backing_;
  uint64_t backing_size_ = 0;
  bool closed_ = true;  // nothing to write out: false from start() to close() of a writable image

  Latch latch_;
  RangeLock ranges_;
  Image image_;
  Allocator allocator_;
  Map map_;
  NeedCheck need_check_;
  Flusher flusher_;
  IdleTimer idle_timer_;

  // One flush cycle's work, from cut() to end_cycle(); touched by its one thread only.
  struct Cycle {
    TableCache::Batch slices;
    Map::L1Changes l1;
  } cycle_;
};

/// Ends a request: after damaged metadata was met, whatever is written could make it worse, so the image is only read
/// until it is opened again. QED has no bit that would tell the next one.
template <class R>
R QedDisk::note(R result) {
  if (!result && !would_wait(result) && image_.damaged && !read_only_) latch_.set(result.error());
  return result;
}

}  // namespace imgfuse::qed
