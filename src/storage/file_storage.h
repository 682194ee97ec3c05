// Storage in a regular file or a block device.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "base/mutex.h"
#include "imgfuse/open.h"
#include "imgfuse/storage.h"
#include "storage/direct_io.h"
#include "storage/host_file.h"
#include "storage/image_lock.h"

namespace imgfuse {

struct FileOptions {
  bool writable = false;
  CacheMode cache = CacheMode::writeback;
  LockRole lock = LockRole::none;
};

/// A host file, locked for as long as this object lives.
///
/// Of the cache modes it knows three: `none` and `directsync` mean O_DIRECT, `unsafe` that flushes do nothing; that
/// writes are durable when they return (`writethrough`, `directsync`) is the Disk's work, which has metadata to flush.
///
/// A flush asks the host only if something was written since the last one that succeeded; callers that arrive during a
/// flush share the next one. Once a flush has failed, all later ones fail: the kernel tells of a lost page only once.
class FileStorage final : public Storage {
 public:
  /// Opens and locks. Errors do not name the file: "no such file", "is a directory, not an image".
  static Result<std::shared_ptr<FileStorage>> open(const std::string& path, const FileOptions& options);
  /// The same with a file that is open for what the options say. `name` is for messages.
  static Result<std::shared_ptr<FileStorage>> adopt(UniqueFd fd, std::string name, const FileOptions& options);

  FileId id() const { return id_; }
  int fd() const { return file_.fd(); }
  FileCounts counts() const { return file_.counts(); }

  const StorageInfo& info() const override { return info_; }
  Result<uint64_t> size() override { return file_.end(); }
  Result<> read(HostOffset offset, Bytes out) override;
  using Storage::write;
  Result<> write(HostOffset offset, std::span<const ConstBytes> parts) override;
  Result<> write_zeroes(HostRange range) override;
  Result<> discard(HostRange range) override;
  Result<> allocate(HostRange range) override;
  Result<> flush() override EXCLUDES(flush_mutex_);
  Result<> resize(uint64_t size) override;
  Result<StorageExtent> extent(HostRange range) override;
  Result<uint64_t> allocated() override;
  int share_file() override;

 private:
  FileStorage(UniqueFd fd, StorageInfo info, FileId id, CacheMode cache, uint64_t end, uint32_t unit)
      : info_(std::move(info)), id_(id), cache_(cache), unit_(unit), file_(std::move(fd), info_.name, end) {}

  HostRange whole_units(HostRange range) const;
  int fallocate(int mode, HostRange range) EXCLUDES(blocks_);
  Result<> write_zero_bytes(HostRange range);
  Result<> fill_holes(HostRange range);

  const StorageInfo info_;
  const FileId id_;
  const CacheMode cache_;
  const uint32_t unit_;  // fallocate takes whole multiples of this

  HostFile file_;
  std::optional<DirectIo> direct_;
  SharedMutex blocks_;                  // see DirectIo
  std::atomic<bool> can_zero_ = true;   // until the host says no
  std::atomic<bool> can_punch_ = true;  // the same

  // Changes that have returned, one ahead: the first flush always reaches the host, since what is read may have been
  // written by somebody who never flushed.
  std::atomic<uint64_t> changes_ = 1;
  std::atomic<bool> shared_ = false;  // others write too, and nobody counts that

  Mutex flush_mutex_;
  uint64_t flushed_ GUARDED_BY(flush_mutex_) = 0;  // changes that are durable
  std::optional<Error> flush_error_ GUARDED_BY(flush_mutex_);
};

}  // namespace imgfuse
