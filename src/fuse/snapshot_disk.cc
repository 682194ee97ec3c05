#include "fuse/snapshot_disk.h"

#include <algorithm>
#include <utility>

#include "base/log.h"

namespace imgfuse::fuse {
namespace {

/// Without a lock: it may do I/O.
void close_disk(const std::shared_ptr<Disk>& disk, const SnapshotInfo& snapshot) {
  if (disk == nullptr) return;
  if (auto closed = disk->close(); !closed)
    log_error("close snapshot {} ({}): {}", snapshot.id, snapshot.name, closed.error().text());
}

}  // namespace

Result<> SnapshotDisk::acquire() {
  {
    Lock lock(mutex_);
    while (opening_) opened_.wait(lock);
    if (shut_) return fail(ErrorCode::io, "snapshot {} is closed", snapshot_.id);
    if (disk_ != nullptr) {
      ++users_;
      return {};
    }
    opening_ = true;
  }
  auto disk = snapshots_.open(snapshot_.id);  // I/O: without the lock
  const Lock lock(mutex_);
  opening_ = false;
  opened_.notify_all();
  if (!disk) return fail(disk.error());
  disk_ = std::move(*disk);
  ++users_;
  return {};
}

void SnapshotDisk::release() {
  std::shared_ptr<Disk> unused;
  {
    const Lock lock(mutex_);
    if (--users_ == 0) unused = std::move(disk_);
  }
  close_disk(unused, snapshot_);
}

void SnapshotDisk::shut() {
  std::shared_ptr<Disk> disk;
  {
    Lock lock(mutex_);
    shut_ = true;
    while (opening_) opened_.wait(lock);
    disk = std::move(disk_);
  }
  close_disk(disk, snapshot_);
}

Result<std::shared_ptr<Disk>> SnapshotDisk::opened() const {
  const Lock lock(mutex_);
  if (disk_ == nullptr) return fail(ErrorCode::io, "snapshot {} is not open", snapshot_.id);
  return disk_;
}

DiskInfo SnapshotDisk::do_info() const {
  return {snapshot_.name, "snapshot", snapshot_.disk_size, cluster_size_, true};
}

/// Nobody has counted. Less than the size, so that copying programs look for holes; more than nothing, which GNU tar
/// takes for a file without data.
uint64_t SnapshotDisk::do_allocated() const {
  constexpr uint64_t kBlock = 512;
  const uint64_t size = snapshot_.disk_size;
  return size <= kBlock ? size : std::max(kBlock, size - kBlock);
}

Result<> SnapshotDisk::do_read(GuestOffset offset, Bytes out) {
  IMG_LET(const auto disk, opened());
  return disk->read(offset, out);
}

Result<std::vector<Extent>> SnapshotDisk::do_map(GuestRange range, size_t max_extents) {
  IMG_LET(const auto disk, opened());
  return disk->map(range, max_extents);
}

Result<> SnapshotDisk::do_close() {
  shut();
  return {};
}

Result<> SnapshotDisk::refuse() const {
  return fail(ErrorCode::read_only, "snapshot {} can only be read", snapshot_.id);
}

}  // namespace imgfuse::fuse
