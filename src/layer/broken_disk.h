// A disk that is not there any more.
#pragma once

#include <utility>

#include "imgfuse/disk.h"

namespace imgfuse::layer {

/// Takes the place of a disk that could not be opened again: every request fails with the error why.
class BrokenDisk final : public Disk {
 public:
  BrokenDisk(DiskInfo info, Error why) : info_(std::move(info)), why_(std::move(why)) {}

 private:
  DiskInfo do_info() const override { return info_; }
  uint64_t do_size() const override { return info_.size; }
  Result<> do_read(GuestOffset, Bytes) override { return fail(why_); }
  Result<> do_write(GuestOffset, ConstBytes) override { return fail(why_); }
  Result<> do_write_zeroes(GuestRange, Zeroing) override { return fail(why_); }
  Result<> do_populate(GuestRange, Holes) override { return fail(why_); }
  Result<> do_forget(GuestRange) override { return fail(why_); }
  Result<std::vector<Extent>> do_map(GuestRange, size_t) override { return fail(why_); }
  Result<> do_flush() override { return fail(why_); }
  Result<> do_resize(uint64_t, ResizeOptions) override { return fail(why_); }
  Result<> do_close() override { return fail(why_); }
  uint64_t do_allocated() const override { return 0; }
  Result<> do_count_allocated(const std::atomic<bool>&) override { return fail(why_); }

  const DiskInfo info_;
  const Error why_;
};

}  // namespace imgfuse::layer
