#include "job/pairs.h"

#include <algorithm>
#include <cstring>

namespace imgfuse::job {

Result<std::vector<Extent>> extents_of(Disk* disk, GuestRange range) {
  std::vector<Extent> extents;
  const GuestOffset end(disk ? std::min(disk->size(), range.end().bytes()) : 0);
  while (range.begin < end) {
    IMG_LET(const std::vector<Extent> next, disk->map({range.begin, end - range.begin}));
    if (next.empty())
      return fail(ErrorCode::io, "{} does not tell what lies at {:#x}", disk->info().name, range.begin.bytes());
    extents.insert(extents.end(), next.begin(), next.end());
    const GuestOffset known = next.back().range.end();
    range = {known, range.end() - known};
  }
  if (!range.empty()) extents.push_back({.range = range});
  return extents;
}

Result<> read_or_zero(Disk* disk, GuestOffset offset, Bytes out) {
  const uint64_t size = disk ? disk->size() : 0;
  const uint64_t there = offset.bytes() < size ? std::min<uint64_t>(out.size(), size - offset.bytes()) : 0;
  if (there < out.size()) std::memset(out.data() + there, 0, out.size() - there);
  return there > 0 ? disk->read(offset, out.first(there)) : Result<>{};
}

std::vector<Pair> pair_up(const std::vector<Extent>& a, const std::vector<Extent>& b) {
  std::vector<Pair> pairs;
  auto other = b.begin();
  for (const Extent& extent : a) {
    for (GuestOffset at = extent.range.begin; at < extent.range.end();) {
      while (other->range.end() <= at) ++other;
      const GuestOffset end = std::min(extent.range.end(), other->range.end());
      pairs.push_back({{at, end - at}, extent, *other});
      at = end;
    }
  }
  return pairs;
}

}  // namespace imgfuse::job
