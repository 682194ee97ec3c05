#include "core/extent_list.h"

#include <utility>

namespace imgfuse {
namespace {

bool are_one(const Extent& a, const Extent& b) {
  return a.kind == b.kind && a.depth == b.depth && a.compressed == b.compressed && a.allocated == b.allocated &&
         a.has_host_offset == b.has_host_offset && (!b.has_host_offset || a.host + a.range.length == b.host);
}

}  // namespace

void ExtentList::append(const Extent& next) {
  if (!extents_.empty() && are_one(extents_.back(), next)) {
    extents_.back().range.length += next.range.length;
  } else {
    extents_.push_back(next);
  }
}

Result<uint64_t> ExtentList::append_below(Disk& backing, GuestRange range) {
  IMG_LET(const std::vector<Extent> below, backing.map(range, max_extents_));
  for (Extent deeper : below) {
    ++deeper.depth;
    append(deeper);
  }
  return below.back().range.end() - range.begin;
}

std::vector<Extent> ExtentList::take() {
  if (extents_.size() > max_extents_) extents_.resize(max_extents_);
  return std::move(extents_);
}

}  // namespace imgfuse
