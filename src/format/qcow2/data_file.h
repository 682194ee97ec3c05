// The external data file of an image.
#pragma once

#include <atomic>
#include <memory>

#include "imgfuse/storage.h"

namespace imgfuse::qcow2 {

/// A host file of which an image uses as much as its disk is long: each guest byte lies at its own offset. Clusters are
/// written whole, but a disk may end inside one, and what a raw data file has must be the disk and nothing else. So
/// writes end where the disk does, and what lies behind reads as zeros, whatever is there.
class DataFile final : public Storage {
 public:
  /// Refuses a block device that is shorter than the disk, and warns of a file that is.
  static Result<std::shared_ptr<DataFile>> open(std::shared_ptr<Storage> file, uint64_t disk_size);

  const StorageInfo& info() const override { return file_->info(); }
  Result<uint64_t> size() override { return end_.load(); }
  Result<> read(HostOffset offset, Bytes out) override;
  using Storage::write;
  Result<> write(HostOffset offset, std::span<const ConstBytes> parts) override;
  Result<> write_zeroes(HostRange range) override;
  Result<> discard(HostRange range) override;
  Result<> allocate(HostRange range) override;
  Result<> flush() override { return file_->flush(); }
  /// The disk ends there from here on. What a growth adds reads as zeros; a file is made as long as the disk.
  Result<> resize(uint64_t size) override;
  Result<StorageExtent> extent(HostRange range) override;
  Result<uint64_t> allocated() override { return file_->allocated(); }
  int share_file() override { return file_->size() == end_.load() ? file_->share_file() : -1; }

 private:
  DataFile(std::shared_ptr<Storage> file, uint64_t disk_size) : file_(std::move(file)), end_(disk_size) {}

  uint64_t in_disk(HostRange range) const;

  const std::shared_ptr<Storage> file_;
  std::atomic<uint64_t> end_;
};

}  // namespace imgfuse::qcow2
