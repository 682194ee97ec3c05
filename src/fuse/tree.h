// What a mount shows: one file, or a directory of files.
#pragma once

#include <sys/stat.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "fuse/node.h"
#include "fuse/raw_file.h"
#include "fuse/snapshot_folder.h"

namespace imgfuse::fuse {

/// The nodes of a mount: those that are built before the mount and fixed from then on, and a folder of snapshots, which
/// come and go. Any thread may read. Borrows the files.
class Tree {
 public:
  /// The mount point itself is the file.
  static Tree of_file(RawFile& file) { return Tree(&file, {}, {}); }
  /// The mount point is a directory, owned by `owner` and last changed at `modified`.
  static Tree of_directory(const FileOwner& owner, timespec modified) { return Tree(nullptr, owner, modified); }

  NodeNumber add_file(NodeNumber directory, std::string name, RawFile& file);
  /// What each opening of the file reads is the text of that moment.
  void add_text(NodeNumber directory, std::string name, TextSource text);
  /// The snapshots of a disk whose file has this owner. Once, and only if the disk can have snapshots.
  void add_snapshots(NodeNumber directory, std::string name, Disk& disk, const FileOwner& owner);
  SnapshotFolder* snapshots() const { return snapshots_.get(); }

  NodeRef find(NodeNumber number) const;
  NodeRef find(NodeNumber directory, std::string_view name) const;
  /// By ascending number.
  std::vector<NodeRef> children(NodeNumber directory) const;
  /// Whether names in the directory can come and go.
  bool is_changing(NodeNumber directory) const { return snapshots_ && snapshots_->number() == directory; }
  struct stat attributes(const Node& node) const;

 private:
  Tree(RawFile* root, const FileOwner& owner, timespec modified)
      : owner_(owner), modified_(modified), nodes_{{kRootNode, kRootNode, "", root}} {}

  FileOwner owner_;          // of directories
  timespec modified_;        // of directories
  std::vector<Node> nodes_;  // node n stands at n - 1
  std::unique_ptr<SnapshotFolder> snapshots_;
};

}  // namespace imgfuse::fuse
