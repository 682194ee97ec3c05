// One open host file: whole transfers out of system calls that may do less than they were asked.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <compare>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/per_cpu.h"
#include "base/unique_fd.h"
#include "imgfuse/storage.h"
#include "storage/access_pattern.h"

namespace imgfuse {

/// "{action}: {what errno means}", with the code a caller acts on.
Error host_error(int error_number, std::string_view action);
/// The same without an action: "no such file".
Error host_error(int error_number);

/// Which file it is, whatever name it was opened by.
struct FileId {
  dev_t device = 0;
  ino_t inode = 0;
  auto operator<=>(const FileId&) const = default;
};

/// A block device is known by its number, whichever node led to it.
Result<FileId> file_id(int fd);

/// System calls made so far.
struct FileCounts {
  uint64_t reads = 0;
  uint64_t writes = 0;
  uint64_t flushes = 0;
};

/// Reads and writes at byte offsets, without regard to alignment: that is DirectIo's. Any thread; all calls block.
///
/// The end of the file is kept in memory and grows by our own writes only, since the image lock keeps others from
/// changing it; so a read of what is in memory costs exactly one system call. Where small reads are scattered, the host
/// does not read ahead.
class HostFile {
 public:
  HostFile(UniqueFd fd, std::string name, uint64_t end)
      : fd_(std::move(fd)), name_(std::move(name)), end_(end), small_reads_fd_(fd_.get()) {}
  ~HostFile();
  HostFile(const HostFile&) = delete;
  HostFile& operator=(const HostFile&) = delete;

  int fd() const { return fd_.get(); }
  const std::string& name() const { return name_; }
  uint64_t end() const { return end_.load(std::memory_order_acquire); }
  FileCounts counts() const { return {reads_.get(), writes_.get(), flushes_.get()}; }

  /// What lies past the end of the file reads as zeros. Heeds NoWait, without O_DIRECT.
  Result<> read(uint64_t offset, Bytes out);
  Result<> write(uint64_t offset, std::span<const ConstBytes> parts);
  /// fallocate(2): its errno, 0 when it succeeded.
  int try_fallocate(int mode, HostRange range);
  Result<> sync();
  Result<> truncate(uint64_t size);

  /// Switches O_DIRECT on or off for all requests that start afterwards; false if the file system refuses.
  bool set_direct(bool on);
  /// With O_DIRECT a read that stops inside a block of this size has met the end of the file; it cannot be continued.
  void set_block(uint32_t bytes) { block_ = bytes; }

  Error error(int error_number, std::string_view verb, HostRange range) const;

 private:
  void grow(uint64_t end);
  bool is_direct() const { return block_ != 1; }
  bool is_small(size_t read) const { return !is_direct() && read < (64 << 10); }
  ssize_t read_some(int from, uint64_t offset, Bytes out);
  void note_miss(uint64_t offset, size_t length);
  int scattered_fd();

  const UniqueFd fd_;
  const std::string name_;
  uint32_t block_ = 1;
  std::atomic<uint64_t> end_;
  std::atomic<bool> knows_absent_ = true;  // until the host says that it cannot tell what is in memory
  AccessPattern misses_;
  std::atomic<int> scattered_fd_ = -1;  // the same file, of which the host reads nothing ahead; -1: not opened so far
  std::atomic<int> small_reads_fd_;     // that one or fd_
  Counter reads_;
  Counter writes_;
  Counter flushes_;
};

}  // namespace imgfuse
