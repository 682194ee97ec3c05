// MemStorage: a host file that lives in memory.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "base/mutex.h"
#include "imgfuse/storage.h"

namespace imgfuse::test {

/// The bytes of a sparse file as a value. Copies share their pages until one of them writes, so that a snapshot of an
/// image costs one map copy. Not thread-safe.
class MemImage {
 public:
  static constexpr size_t kPageSize = 4096;

  uint64_t size() const { return size_; }
  uint64_t allocated() const { return pages_.size() * kPageSize; }
  /// Past the end: zeros.
  void read(uint64_t offset, Bytes out) const;
  /// Past the end: grows.
  void write(uint64_t offset, ConstBytes data);
  /// Never grows; whole pages become holes.
  void zero(uint64_t offset, uint64_t length);
  void resize(uint64_t size);
  /// The longest run of only present or only absent pages at `offset`, at most `length` long.
  StorageExtent extent(uint64_t offset, uint64_t length) const;

  /// A host file with the same content and holes, for qemu-img. An error is a failed test.
  static MemImage load(const std::string& path);
  void save(const std::string& path) const;

 private:
  using Page = std::array<std::byte, kPageSize>;

  Page& own_page(uint64_t index);

  uint64_t size_ = 0;
  std::map<uint64_t, std::shared_ptr<Page>> pages_;  // by offset / kPageSize; absent: zeros
};

/// How often each call was made, for tests that count.
struct StorageCounts {
  std::atomic<uint64_t> reads = 0;
  std::atomic<uint64_t> writes = 0;
  std::atomic<uint64_t> zeroes = 0;
  std::atomic<uint64_t> discards = 0;
  std::atomic<uint64_t> flushes = 0;
  std::atomic<uint64_t> bytes_read = 0;
  std::atomic<uint64_t> bytes_written = 0;

  void reset() { reads = writes = zeroes = discards = flushes = bytes_read = bytes_written = 0; }
};

/// A writable, extensible Storage over a MemImage. Thread-safe; no call fails.
class MemStorage final : public Storage {
 public:
  explicit MemStorage(MemImage image = {}, bool writable = true);

  /// What the file holds at this moment.
  MemImage image() const;
  StorageCounts& counts() { return counts_; }

  const StorageInfo& info() const override { return info_; }
  Result<uint64_t> size() override;
  Result<> read(HostOffset offset, Bytes out) override;
  Result<> write(HostOffset offset, std::span<const ConstBytes> parts) override;
  using Storage::write;
  Result<> write_zeroes(HostRange range) override;
  Result<> discard(HostRange range) override;
  Result<> allocate(HostRange range) override;
  Result<> flush() override;
  Result<> resize(uint64_t size) override;
  Result<StorageExtent> extent(HostRange range) override;
  Result<uint64_t> allocated() override;

 private:
  const StorageInfo info_;
  StorageCounts counts_;

  mutable SharedMutex mutex_;
  MemImage image_ GUARDED_BY(mutex_);
};

}  // namespace imgfuse::test
