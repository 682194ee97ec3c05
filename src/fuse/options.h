// How a disk is presented: what the user says with -o, in the manner of FUSE and mount(8).
#pragma once

#include <sys/types.h>

#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "imgfuse/error.h"

namespace imgfuse::fuse {

inline constexpr unsigned kDefaultThreads = 16;

/// FUSE over io_uring: where the kernel has it, asked for, never.
enum class Rings { automatic, on, off };

/// Everything that concerns the presented file and its mount, and nothing of the image.
struct MountOptions {
  bool read_only = false;
  bool allow_other = false;
  bool allow_root = false;
  bool auto_unmount = false;
  bool synchronous = false;      ///< mount(8)'s sync: every write is followed by an fsync
  bool direct_io = false;        ///< the kernel caches nothing of the presented file
  bool writeback_cache = false;  ///< the kernel holds written data back; writes past the end then fail at fsync
  bool passthrough = false;      ///< the kernel reads and writes the host file by itself, where that can be
  bool single_threaded = false;
  bool clone_fd = false;
  bool debug = false;
  unsigned max_threads = kDefaultThreads;
  Rings rings = Rings::automatic;
  std::optional<uid_t> uid;  ///< default: whoever mounts
  std::optional<gid_t> gid;
  std::optional<mode_t> umask;  ///< bits taken from 0666; without it only the owner has access
  std::optional<std::string> fsname;
  std::string subtype = "imgfuse";
};

/// Takes the options that are not the presented file's: false if it does not know the key either. `value` is empty
/// where none was given.
using OtherOption = std::function<Result<bool>(std::string_view key, const std::string& value)>;

/// Reads a list such as "ro,allow_other,umask=077" into `options`. A backslash makes the next character plain, so that
/// values can hold commas. Options that only mount(8) or systemd look at are skipped; an unknown one is an error.
Result<> parse_options(std::string_view list, MountOptions& options, const OtherOption& other);

/// The list for libfuse's own parser. `image` is the default of fsname.
std::string libfuse_options(const MountOptions& options, std::string_view image);

}  // namespace imgfuse::fuse
