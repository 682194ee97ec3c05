// What a mount shows: one file, or a directory of files.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "fuse/raw_file.h"

namespace imgfuse::fuse {

/// As the kernel numbers it; the root is 1.
using NodeNumber = uint64_t;
inline constexpr NodeNumber kRootNode = 1;

struct Node {
  NodeNumber number;
  NodeNumber parent;
  std::string name;
  RawFile* file;  ///< null: a directory
};

/// The nodes of a mount. Built before the mount and fixed from then on, so that any thread may read. Borrows the files.
class Tree {
 public:
  /// The mount point itself is the file.
  static Tree of_file(RawFile& file) { return Tree(&file, {}, {}); }
  /// The mount point is a directory, owned by `owner` and last changed at `modified`.
  static Tree of_directory(const FileOwner& owner, timespec modified) { return Tree(nullptr, owner, modified); }

  NodeNumber add_file(NodeNumber directory, std::string name, RawFile& file);

  /// Null if there is no such node.
  const Node* find(NodeNumber number) const;
  const Node* find(NodeNumber directory, std::string_view name) const;
  std::vector<const Node*> children(NodeNumber directory) const;
  struct stat attributes(const Node& node) const;

 private:
  Tree(RawFile* root, const FileOwner& owner, timespec modified)
      : owner_(owner), modified_(modified), nodes_{{kRootNode, kRootNode, "", root}} {}

  FileOwner owner_;          // of directories
  timespec modified_;        // of directories
  std::vector<Node> nodes_;  // node n stands at n - 1
};

}  // namespace imgfuse::fuse
