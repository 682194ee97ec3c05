// How snapshots are listed.
#pragma once

#include <iosfwd>
#include <vector>

#include "imgfuse/check.h"

namespace imgfuse::tool {

/// The columns of "qemu-img snapshot -l", and the size of the disk.
void print_snapshots(std::ostream& out, const std::vector<SnapshotInfo>& snapshots);

}  // namespace imgfuse::tool
