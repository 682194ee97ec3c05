// A disk as a file: what stat says about it.
#pragma once

#include <sys/stat.h>

#include <atomic>
#include <cstdint>

#include "imgfuse/disk.h"

namespace imgfuse::fuse {

struct FileOwner {
  uid_t uid = 0;
  gid_t gid = 0;
  mode_t mode = 0600;  ///< permission bits
};

/// The presented file of one disk. Borrows the disk. Any thread may call.
class RawFile {
 public:
  /// `modified` is the time of the last change as stat shows it until the first write.
  RawFile(Disk& disk, const FileOwner& owner, timespec modified);

  Disk& disk() { return disk_; }
  bool read_only() const { return read_only_; }
  const FileOwner& owner() const { return owner_; }
  /// Without the node number.
  struct stat attributes() const;
  /// Something was written.
  void touch();
  void set_modified(timespec time);
  /// What the kernel knows the disk's host file by (passthrough.h); 0: it reads and writes through us.
  int32_t host_file() const { return host_file_; }
  void set_host_file(int32_t number) { host_file_ = number; }

 private:
  Disk& disk_;
  const FileOwner owner_;
  const bool read_only_;
  const uint32_t cluster_size_;
  std::atomic<int64_t> modified_;  // nanoseconds since 1970
  std::atomic<int32_t> host_file_ = 0;
};

}  // namespace imgfuse::fuse
