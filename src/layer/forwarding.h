// What decorators of a disk have in common.
#pragma once

#include "imgfuse/disk.h"

namespace imgfuse::layer {

/// Passes everything on to another disk, which it borrows. Decorators override what they change.
class Forwarding : public Disk {
 public:
  explicit Forwarding(Disk& below) : below_(below) {}

  Snapshots* snapshots() override { return below_.snapshots(); }
  Bitmaps* bitmaps() override { return below_.bitmaps(); }
  BackgroundCopy* background_copy() override { return below_.background_copy(); }
  DiskStatistics statistics() const override { return below_.statistics(); }

 protected:
  Disk& below() const { return below_; }

  DiskInfo do_info() const override { return below_.info(); }
  uint64_t do_size() const override { return below_.size(); }
  Result<> do_read(GuestOffset offset, Bytes out) override { return below_.read(offset, out); }
  Result<> do_write(GuestOffset offset, ConstBytes data) override { return below_.write(offset, data); }
  Result<> do_write_zeroes(GuestRange range, Zeroing zeroing) override { return below_.write_zeroes(range, zeroing); }
  Result<> do_populate(GuestRange range, Holes holes) override { return below_.populate(range, holes); }
  Result<> do_forget(GuestRange range) override { return below_.forget(range); }
  Result<std::vector<Extent>> do_map(GuestRange range, size_t max_extents) override {
    return below_.map(range, max_extents);
  }
  Result<> do_flush() override { return below_.flush(); }
  Result<> do_resize(uint64_t size, ResizeOptions options) override { return below_.resize(size, options); }
  Result<> do_close() override { return below_.close(); }
  uint64_t do_allocated() const override { return below_.allocated(); }
  Result<> do_count_allocated(const std::atomic<bool>& stop) override { return below_.count_allocated(stop); }

 private:
  Disk& below_;
};

}  // namespace imgfuse::layer
