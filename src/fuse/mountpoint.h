// Where a disk can be mounted, and what is mounted there already.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "imgfuse/error.h"

namespace imgfuse::fuse {

/// A line of /proc/self/mountinfo. Reading it touches no file system, so that a dead daemon hangs nobody.
struct MountEntry {
  dev_t device = 0;  ///< no two mounted file systems share it
  std::string path;
  std::string type;    ///< "fuse.imgfuse"
  std::string source;  ///< the image, if -o fsname did not say otherwise
  uid_t user = 0;      ///< who mounted, for FUSE
};

bool is_fuse(const MountEntry& entry);
/// What is mounted, in the order of mounting.
std::vector<MountEntry> mount_table();

/// What is mounted at `path` (absolute, canonical), the topmost if there are several.
std::optional<MountEntry> find_mount(const std::string& path);

/// The absolute path without symbolic links, also where the last component is a mount whose daemon is gone. The error
/// does not repeat the path.
Result<std::string> canonical_path(const std::string& path);

enum class MountpointKind { file, directory };
struct Mountpoint {
  std::string path;  ///< canonical
  MountpointKind kind = MountpointKind::file;
};
/// Checks that an image can be mounted at `path`. `image` is the image's canonical path. The errors say what to do.
Result<Mountpoint> check_mountpoint(const std::string& path, const std::string& image);

}  // namespace imgfuse::fuse
