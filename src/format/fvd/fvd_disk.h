// One FVD image as a Disk: how guest requests travel.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "base/latch.h"
#include "core/flusher.h"
#include "core/range_lock.h"
#include "format/fvd/chunks.h"
#include "format/fvd/fvd.h"
#include "format/fvd/header.h"
#include "format/fvd/map.h"

namespace imgfuse::fvd {

/// A request takes one lease: shared for reading and for writing what is in the image already, exclusive over whole
/// blocks (and chunks, where some have no storage) for what is not. So all who bring a block into the image take turns.
/// Data are written first, then the map changes in memory, and a flush cycle makes it durable.
class FvdDisk final : public Disk, private Flusher::Client {
 public:
  FvdDisk(std::shared_ptr<Storage> storage, std::shared_ptr<Storage> data, const Header& header,
          OpenParameters parameters);
  ~FvdDisk() override;

  /// Loads the map, opens the base, and brings a writable image that was not closed cleanly in order.
  Result<> start(const BackingOpener& open_backing);

  int share_host_file() override;

  DiskStatistics statistics() const override { return {.flush_cycles = flusher_.cycles()}; }

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
  Result<> do_count_allocated(const std::atomic<bool>&) override { return {}; }  // it is always exact

  void cut() override;
  Result<bool> write_stage(unsigned stage) override;
  bool needs_barrier(unsigned stage) const override;
  void end_cycle(bool durable) override;

  // These expect a lease on the range.
  Result<> read_range(GuestOffset offset, Bytes out);
  Result<> read_base(GuestOffset offset, Bytes out);
  Result<> store(GuestOffset offset, ConstBytes data, Durability durability);
  Result<> write_parts(GuestRange stored, std::span<const NewChunk> chunks, std::span<const ConstBytes> parts);
  Result<std::vector<NewChunk>> reserve_chunks(GuestRange range, GuestRange overwritten);
  Result<> zero_piece(GuestRange range, Zeroing zeroing);
  Result<> zero_base(GuestRange range, Zeroing zeroing, Durability durability);
  Result<> zero_host(HostRange range, Zeroing zeroing);
  Result<> populate_piece(GuestRange range, Holes holes);
  Result<> return_to_base();
  Result<> zero_rest(GuestRange range);

  GuestRange exclusive_range(GuestRange range, Need need) const;
  Result<> relieve();
  Result<> ensure_length(uint64_t end);

  /// Everything is in place, the journal empty, and the header says so. Without requests meanwhile it stays so.
  Result<> checkpoint();
  Map::WithBase with_base() const { return keeps_base_ ? Map::WithBase::keep : Map::WithBase::leave; }
  Result<> mark_dirty();
  Result<> zero_journal();
  Result<> grow(uint64_t old_size, uint64_t size, Preallocation preallocation);
  Result<> shrink(uint64_t size);
  Result<> clear_entries(uint64_t first, uint64_t end);
  Result<> make_table_room(const Header& wanted);
  Result<> zero_behind(uint64_t old_size, uint64_t size);
  Result<> preallocate_range(GuestRange range, Preallocation mode);
  Result<> change_header(const std::function<Result<>()>& write);

  std::shared_ptr<Storage> storage_;
  std::shared_ptr<Storage> data_;  // where guest data lie: the image file or another
  const std::string name_;
  const bool read_only_;
  Header header_;  // as opened; changes under a lease on the whole disk
  std::atomic<uint64_t> size_;
  std::unique_ptr<Disk> base_;
  uint64_t base_length_ = 0;
  std::atomic<bool> whole_ = false;  // the data region is known to reach to the disk's end
  bool closed_ = true;               // nothing to write out: false from start() to close() of a writable image

  Latch latch_;
  RangeLock ranges_;
  Map map_;
  Chunks chunks_;
  Flusher flusher_;

  std::atomic<bool> checkpoint_wanted_ = false;  // by the next cycle
  std::atomic<bool> clean_wanted_ = false;
  std::atomic<bool> keeps_base_;  // though everything may be in the image

  std::atomic<uint64_t> journal_sectors_;  // 0: none; changes under a lease on the whole disk
  std::atomic<bool> clean_on_disk_;        // what the header says; always, where there is no journal

  // Touched by one flush cycle at a time.
  uint64_t journal_next_ = 0;     // sector to be written next
  bool journal_is_zero_ = false;  // from there on
  struct {
    MapCut map;
    bool clean = false;
    bool marks = false;  // the header, as unclean
  } cycle_;
};

}  // namespace imgfuse::fvd
