// A disk that belongs to somebody else.
#pragma once

#include "imgfuse/disk.h"

namespace imgfuse {

/// Reads another disk, which outlives it and which it does not close.
class BorrowedDisk final : public Disk {
 public:
  explicit BorrowedDisk(Disk& lender) : lender_(lender) {}

 private:
  DiskInfo do_info() const override {
    DiskInfo info = lender_.info();
    info.read_only = true;
    return info;
  }
  uint64_t do_size() const override { return lender_.size(); }
  Result<> do_read(GuestOffset offset, Bytes out) override { return lender_.read(offset, out); }
  Result<> do_write(GuestOffset, ConstBytes) override { return refuse(); }
  Result<> do_write_zeroes(GuestRange, Zeroing) override { return refuse(); }
  Result<> do_populate(GuestRange, Holes) override { return refuse(); }
  Result<std::vector<Extent>> do_map(GuestRange range, size_t max_extents) override {
    return lender_.map(range, max_extents);
  }
  Result<> do_flush() override { return {}; }
  Result<> do_resize(uint64_t, ResizeOptions) override { return refuse(); }
  Result<> do_close() override { return {}; }
  uint64_t do_allocated() const override { return lender_.allocated(); }
  Result<> do_count_allocated(const std::atomic<bool>&) override { return {}; }

  Result<> refuse() const { return fail(ErrorCode::read_only, "{} is open read-only", lender_.info().name); }

  Disk& lender_;
};

}  // namespace imgfuse
