#include "fuse/seek.h"

namespace imgfuse::fuse {
namespace {

// An image can claim more disk than anybody can search. What is not searched counts as data, which is always allowed.
constexpr unsigned kMaxSteps = 1024;

}  // namespace

Result<std::optional<GuestOffset>> find_boundary(Disk& disk, GuestOffset from, Content wanted) {
  const GuestOffset end(disk.size());
  if (from >= end) return std::nullopt;
  for (unsigned step = 0; from < end; ++step) {
    if (step == kMaxSteps) return wanted == Content::data ? from : end;
    IMG_LET(const auto extents, disk.map({from, end - from}));
    if (extents.empty()) return fail(ErrorCode::corrupt, "no extent at {:#x}", from.bytes());
    for (const Extent& extent : extents) {
      const Content content = extent.kind == ExtentKind::data ? Content::data : Content::hole;
      if (content == wanted) return extent.range.begin;
    }
    from = extents.back().range.end();
  }
  if (wanted == Content::hole) return end;
  return std::nullopt;
}

}  // namespace imgfuse::fuse
