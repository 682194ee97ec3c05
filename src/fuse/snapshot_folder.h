// The folder of a mount in which every internal snapshot of the disk is a read-only file.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/mutex.h"
#include "fuse/node.h"
#include "fuse/raw_file.h"
#include "imgfuse/snapshots.h"

namespace imgfuse::fuse {

/// A snapshot keeps its file name and its node number for as long as it is there; numbers are not used again. Any
/// thread may look; one at a time may refresh().
class SnapshotFolder {
 public:
  /// Numbers from `first` on are this folder's. Borrows the disk, whose snapshots they are; `owner` is of its file, and
  /// loses the right to write here.
  SnapshotFolder(Disk& disk, NodeNumber folder, NodeNumber first, const FileOwner& owner);

  /// Follows the disk's list of snapshots. To be called whenever it has changed.
  void refresh() EXCLUDES(mutex_);
  /// Closes what is open, for good. To be called before the disk is closed.
  void close_all() EXCLUDES(mutex_);

  NodeNumber number() const { return folder_; }
  NodeRef find(NodeNumber number) const EXCLUDES(mutex_);
  NodeRef find(std::string_view name) const EXCLUDES(mutex_);
  /// By ascending number.
  std::vector<NodeRef> children() const EXCLUDES(mutex_);

 private:
  struct Entry;

  void add(const SnapshotInfo& snapshot) REQUIRES(mutex_);
  std::string free_name(const SnapshotInfo& snapshot) const REQUIRES(mutex_);

  Snapshots& snapshots_;
  const uint32_t cluster_size_;
  const NodeNumber folder_;
  FileOwner owner_;
  mutable Mutex mutex_;
  NodeNumber next_ GUARDED_BY(mutex_);
  std::map<NodeNumber, std::shared_ptr<Entry>> entries_ GUARDED_BY(mutex_);
  std::map<std::string, NodeNumber, std::less<>> names_ GUARDED_BY(mutex_);
};

/// A file name for a snapshot of that name: `suffix` and `.raw` at its end, without what a name must not have.
std::string safe_file_name(std::string_view name, std::string_view suffix);

}  // namespace imgfuse::fuse
