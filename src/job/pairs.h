// Two disks side by side.
#pragma once

#include <vector>

#include "imgfuse/disk.h"

namespace imgfuse::job {

/// What lies in all of `range`. A disk that is absent (null) or ends before is a hole.
Result<std::vector<Extent>> extents_of(Disk* disk, GuestRange range);

/// As Disk::read(), with zeros where the disk is absent or has ended.
Result<> read_or_zero(Disk* disk, GuestOffset offset, Bytes out);

/// A stretch in which either disk has one extent.
struct Pair {
  GuestRange range;
  Extent a, b;
  bool both_zero() const { return a.kind != ExtentKind::data && b.kind != ExtentKind::data; }
};

/// Both cover the same range.
std::vector<Pair> pair_up(const std::vector<Extent>& a, const std::vector<Extent>& b);

}  // namespace imgfuse::job
