// SEEK_DATA and SEEK_HOLE.
#pragma once

#include <optional>

#include "imgfuse/disk.h"

namespace imgfuse::fuse {

enum class Content { data, hole };

/// The first position at or behind `from` where such content is; the end of the disk counts as a hole. None if `from`
/// is not on the disk, or if there is no more data. Zero clusters count as holes.
Result<std::optional<GuestOffset>> find_boundary(Disk& disk, GuestOffset from, Content wanted);

}  // namespace imgfuse::fuse
