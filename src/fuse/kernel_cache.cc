#include "fuse/kernel_cache.h"

#include <fuse_lowlevel.h>

#include <cerrno>
#include <cstring>

#include "fuse/own_mount.h"
#include "fuse/raw_file.h"

namespace imgfuse::fuse {

Result<> KernelCache::write_back() {
  if (file_.read_only()) return {};
  return fuse::write_back(place_.path, place_.device);
}

/// With a write-back cache the kernel is the master of size and time; in any case it takes a size that it sets itself,
/// and what it held behind the end is gone.
Result<> KernelCache::publish_size() {
  return set_size_and_time(place_.path, place_.device, file_.disk().size(), file_.attributes().st_mtim);
}

Result<> KernelCache::drop() {
  const int error = fuse_lowlevel_notify_inval_inode(session_, place_.node, 0, 0);
  if (error == 0 || error == -ENOENT) return {};  // it may never have heard of the file
  return fail(ErrorCode::io, "make the kernel forget {}: {}", place_.path, strerror(-error));
}

}  // namespace imgfuse::fuse
