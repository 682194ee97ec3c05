// A disk as storage: for data that lie in an image of another format.
#pragma once

#include <memory>
#include <string>

#include "core/range_lock.h"
#include "imgfuse/disk.h"
#include "imgfuse/storage.h"

namespace imgfuse {

/// Owns the disk, and closes it when it goes. A disk that is open for writing grows with what is written past its end.
class DiskStorage final : public Storage {
 public:
  explicit DiskStorage(std::unique_ptr<Disk> disk);
  ~DiskStorage() override;

  const StorageInfo& info() const override { return info_; }
  Result<uint64_t> size() override { return disk_->size(); }
  Result<> read(HostOffset offset, Bytes out) override;
  using Storage::write;
  Result<> write(HostOffset offset, std::span<const ConstBytes> parts) override;
  Result<> write_zeroes(HostRange range) override;
  Result<> discard(HostRange range) override;
  Result<> allocate(HostRange range) override;
  Result<> flush() override { return disk_->flush(); }
  Result<> resize(uint64_t size) override;
  Result<StorageExtent> extent(HostRange range) override;
  Result<uint64_t> allocated() override { return disk_->allocated(); }

 private:
  Result<> grow_to(uint64_t size);
  /// What of the range the disk has.
  GuestRange inside(HostRange range) const;

  const std::unique_ptr<Disk> disk_;
  const StorageInfo info_;
  RangeLock growth_;  // a lease on its first byte is the right to change the size
};

}  // namespace imgfuse
