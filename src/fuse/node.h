// What the kernel knows by a number: a file or a directory of the mount.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace imgfuse::fuse {

class RawFile;
class SnapshotDisk;

/// As the kernel numbers it; the root is 1.
using NodeNumber = uint64_t;
inline constexpr NodeNumber kRootNode = 1;

/// What a file that can only be read says at this moment. Any thread may call.
using TextSource = std::function<std::string()>;

struct Node {
  NodeNumber number;
  NodeNumber parent;
  std::string name;
  RawFile* file;                     ///< null: a directory, or a text
  SnapshotDisk* snapshot = nullptr;  ///< the file's disk, where it is open only while the file is
  TextSource text = {};              ///< instead of a disk

  bool is_directory() const { return file == nullptr && !text; }
};

/// Keeps what can disappear; null if there is no such node.
using NodeRef = std::shared_ptr<const Node>;

}  // namespace imgfuse::fuse
