// A snapshot as a disk that is open only while somebody uses it.
#pragma once

#include <memory>
#include <string>

#include "base/mutex.h"
#include "imgfuse/snapshots.h"

namespace imgfuse::fuse {

/// Read-only. Knows its size from the list of snapshots; everything else needs acquire(). Any thread may call.
class SnapshotDisk : public Disk {
 public:
  SnapshotDisk(Snapshots& snapshots, SnapshotInfo snapshot, uint32_t cluster_size)
      : snapshots_(snapshots), snapshot_(std::move(snapshot)), cluster_size_(cluster_size) {}
  ~SnapshotDisk() override { shut(); }

  const SnapshotInfo& snapshot() const { return snapshot_; }
  /// The first one opens the snapshot. Each that succeeds needs a release(), of which the last closes it.
  Result<> acquire() EXCLUDES(mutex_);
  void release() EXCLUDES(mutex_);
  /// Closes it for good, whoever uses it.
  void shut() EXCLUDES(mutex_);

 private:
  Result<std::shared_ptr<Disk>> opened() const EXCLUDES(mutex_);
  Result<> refuse() const;

  DiskInfo do_info() const override;
  uint64_t do_size() const override { return snapshot_.disk_size; }
  uint64_t do_allocated() const override;
  Result<> do_read(GuestOffset offset, Bytes out) override;
  Result<std::vector<Extent>> do_map(GuestRange range, size_t max_extents) override;
  Result<> do_flush() override { return {}; }
  Result<> do_close() override;
  Result<> do_count_allocated(const std::atomic<bool>&) override { return {}; }
  Result<> do_write(GuestOffset, ConstBytes) override { return refuse(); }
  Result<> do_write_zeroes(GuestRange, Zeroing) override { return refuse(); }
  Result<> do_populate(GuestRange, Holes) override { return refuse(); }
  Result<> do_resize(uint64_t, ResizeOptions) override { return refuse(); }

  Snapshots& snapshots_;
  const SnapshotInfo snapshot_;
  const uint32_t cluster_size_;
  mutable Mutex mutex_;
  ConditionVariable opened_;
  unsigned users_ GUARDED_BY(mutex_) = 0;
  bool opening_ GUARDED_BY(mutex_) = false;  // by one of the users; the others wait
  bool shut_ GUARDED_BY(mutex_) = false;
  std::shared_ptr<Disk> disk_ GUARDED_BY(mutex_);
};

}  // namespace imgfuse::fuse
