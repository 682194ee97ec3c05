// The files of a mounted disk, for the daemon's jobs.
#pragma once

#include <memory>
#include <string>

#include "imgfuse/jobs.h"
#include "imgfuse/open.h"

namespace imgfuse::tool {

/// `image`: the name of the disk that was opened, with these options, from `path`.
std::shared_ptr<ImageChain> mounted_chain(const OpenOptions& mounted, const std::string& image,
                                          const std::string& path);

}  // namespace imgfuse::tool
