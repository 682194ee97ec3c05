// Where the daemon's jobs write to.
#pragma once

#include <string>

#include "imgfuse/jobs.h"
#include "imgfuse/open.h"

namespace imgfuse::tool {

/// The mode for images behind a disk that flushes each write itself.
CacheMode without_write_through(CacheMode mode);

/// Opens the targets of jobs on `image`, which is mounted at `mountpoint` with these options. Refuses files in the
/// mount itself, and on a file system in it: to write there would wait for itself.
OpenTarget target_opener(const OpenOptions& mounted, const std::string& image, const std::string& mountpoint);

}  // namespace imgfuse::tool
