// Mounting an image that is not to change.
#pragma once

#include <memory>
#include <string>

#include "imgfuse/open.h"

namespace imgfuse::tool {

struct Overlay {
  std::unique_ptr<Disk> disk;
  OpenOptions options;  ///< with which it was opened,
  std::string path;     ///< and from where it can be opened again
};

/// Opens a qcow2 overlay on `image` in place of it: the one at `overlay`, which is made if it is not there, or, if that
/// is empty, a nameless one in $TMPDIR (/var/tmp) that is gone with the disk.
Result<Overlay> open_overlay(const std::string& image, const std::string& overlay, const OpenOptions& options);

}  // namespace imgfuse::tool
