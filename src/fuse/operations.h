// What the kernel asks for, as calls on Disk.
#pragma once

#include <fuse_lowlevel.h>

#include <functional>

#include "fuse/options.h"
#include "fuse/tree.h"

namespace imgfuse::fuse {

class Connection;

/// What the handlers work on: libfuse's userdata of the session. Outlives it.
struct Served {
  const Tree& tree;
  const MountOptions& options;
  /// Called once by the first request, before any other is answered.
  std::function<void()> on_init;
  Connection* connection = nullptr;
};

/// The handlers. Any number of threads runs them at the same time; each request is answered before its handler returns.
const fuse_lowlevel_ops& operations();

}  // namespace imgfuse::fuse
