// The directory of persistent dirty bitmaps (section 20), as far as a check needs it.
#pragma once

#include <optional>
#include <vector>

#include "format/qcow2/header.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"
#include "imgfuse/units.h"

namespace imgfuse::qcow2 {

struct BitmapDirectory {
  HostRange range;
  std::vector<HostRange> tables;
};

/// Nothing unless the image says that its bitmaps are valid.
Result<std::optional<BitmapDirectory>> read_bitmap_directory(Storage& storage, const Header& header);

}  // namespace imgfuse::qcow2
