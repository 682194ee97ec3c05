// What the kernel holds of the file of a mounted disk: pages and attributes.
#pragma once

#include <sys/types.h>

#include <string>

#include "fuse/node.h"
#include "imgfuse/error.h"

struct fuse_session;

namespace imgfuse::fuse {

/// Of one file. The calls make requests of this mount, which other threads must answer meanwhile: not to be called by
/// them, nor when they have stopped. Borrows session and file.
class KernelCache {
 public:
  struct Place {
    std::string path;  ///< of the file
    dev_t device = 0;  ///< of the mount
    NodeNumber node = kRootNode;
  };
  KernelCache(fuse_session* session, Place place, RawFile& file)
      : session_(session), place_(std::move(place)), file_(file) {}

  /// Everything that was written to the file comes to the disk, as an unmount has it.
  Result<> write_back();
  /// The kernel learns size and time of the file.
  Result<> publish_size();
  /// Nothing is left of what was read before.
  Result<> drop();

 private:
  fuse_session* session_;
  const Place place_;
  RawFile& file_;
};

}  // namespace imgfuse::fuse
