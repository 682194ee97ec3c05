#include "job/mirror_copy.h"

#include <algorithm>

namespace imgfuse::job {
namespace {

/// Few enough that looking at a stretch, and writing its zeros, is soon done.
constexpr uint64_t kStretch = uint64_t{256} << 20;
constexpr size_t kExtents = 256;

Result<> from_source(Result<> result) { return result ? result : fail(result.error().during("read what is mirrored")); }

Result<> to_target(Disk& target, Result<> result) {
  return result ? result : fail(result.error().during("write to {}", target.info().name));
}

Result<std::vector<Extent>> extents_in(Disk& source, GuestRange range) {
  auto extents = source.map(range, kExtents);
  if (!extents) return fail(extents.error().during("read what is mirrored"));
  if (extents->empty())
    return fail(ErrorCode::io, "{} does not tell what lies at {:#x}", source.info().name, range.begin.bytes());
  return extents;
}

/// What the disk has from above the base and not itself. Without a base what reads as zeros does so without the layers
/// too, but for an image that would not leave them (`all`); above one, where a layer has ended that is shorter than the
/// base, zeros have to be kept.
bool is_to_be_filled(const Extent& extent, uint32_t layers, bool all) {
  if (layers == 0) return extent.depth > 0 && (all || extent.kind == ExtentKind::data);
  return extent.depth < layers && (extent.depth > 0 || extent.kind == ExtentKind::hole);
}

/// Hands out memory from the front of the pieces.
class Room {
 public:
  explicit Room(const std::vector<Bytes>& memory) : memory_(memory) {}

  /// At most this much, in one piece.
  Bytes take(uint64_t length) {
    if (used_ == memory_[piece_].size()) {
      ++piece_;
      used_ = 0;
    }
    const Bytes rest = memory_[piece_].subspan(used_);
    const Bytes taken = rest.first(std::min<uint64_t>(rest.size(), length));
    used_ += taken.size();
    return taken;
  }

 private:
  const std::vector<Bytes>& memory_;
  size_t piece_ = 0;
  size_t used_ = 0;
};

Result<> copy_data(Disk& source, Disk& target, GuestRange range, Room& room) {
  while (!range.empty()) {
    const Bytes content = room.take(range.length);
    IMG_TRY(from_source(source.read(range.begin, content)));
    IMG_TRY(to_target(target, target.write(range.begin, content)));
    range = {range.begin + content.size(), range.length - content.size()};
  }
  return {};
}

}  // namespace

Result<> copy_range(Disk& source, Disk& target, GuestRange range, const std::vector<Bytes>& memory, uint32_t layers) {
  enum class Way { read, zero, leave };
  const auto way = [layers](const Extent& extent) {
    if (extent.depth >= layers) return Way::leave;
    return extent.kind == ExtentKind::data ? Way::read : Way::zero;
  };
  Room room(memory);
  while (!range.empty()) {
    IMG_LET(const std::vector<Extent> extents, extents_in(source, range));
    for (auto extent = extents.begin(); extent != extents.end();) {
      GuestRange run = extent->range;
      const Way first = way(*extent);
      for (++extent; extent != extents.end() && way(*extent) == first; ++extent) run.length += extent->range.length;
      if (first == Way::read) IMG_TRY(copy_data(source, target, run, room));
      if (first == Way::zero) IMG_TRY(to_target(target, target.write_zeroes(run, Zeroing::may_free)));
    }
    const GuestOffset known = extents.back().range.end();
    range = {known, range.end() - known};
  }
  return {};
}

Result<> fill_range(Disk& disk, GuestRange range, uint32_t layers) {
  const bool all = disk.info().leaves_backing_when_full;
  while (!range.empty()) {
    IMG_LET(const std::vector<Extent> extents, extents_in(disk, range));
    for (const Extent& extent : extents) {
      // What no layer above the base decides would show the base then if it stayed a hole.
      const Holes holes = extent.depth > 0 ? Holes::keep : Holes::fill;
      if (is_to_be_filled(extent, layers, all)) IMG_TRY(to_target(disk, disk.populate(extent.range, holes)));
    }
    const GuestOffset known = extents.back().range.end();
    range = {known, range.end() - known};
  }
  return {};
}

Result<bool> Survey::step() {
  if (at_ == size_ || shape_.sync == MirrorSync::none) return false;
  IMG_LET(const std::vector<Extent> extents, extents_in(source_, {GuestOffset(at_), std::min(kStretch, size_ - at_)}));
  for (const Extent& extent : extents) {
    IMG_TRY(look_at(extent));
    at_ = extent.range.end().bytes();
  }
  return at_ < size_;
}

Result<> Survey::look_at(const Extent& extent) {
  switch (shape_.kind) {
    case JobKind::mirror:
      return look_for_mirror(extent);
    case JobKind::backup:
      look_for_backup(extent);
      break;
    case JobKind::stream:
      if (is_to_be_filled(extent, shape_.layers, fills_all_)) mark_(extent.range);
      break;
    case JobKind::commit:
      if (extent.depth < shape_.layers) mark_(extent.range);
      break;
  }
  return {};
}

/// What reads as zeros here and has not been copied did so when the backup began, since who changes it copies it first.
void Survey::look_for_backup(const Extent& extent) {
  const bool own = extent.depth == 0 && extent.kind != ExtentKind::hole;
  const bool left_out =
      shape_.sync == MirrorSync::top ? !own : extent.kind != ExtentKind::data && shape_.target_is_zero;
  if (left_out) mark_(extent.range);
}

Result<> Survey::look_for_mirror(const Extent& extent) {
  const bool own = extent.depth == 0 && extent.kind != ExtentKind::hole;
  if (shape_.sync == MirrorSync::top && !own) return {};
  if (extent.kind == ExtentKind::data) {
    mark_(extent.range);
    return {};
  }
  if (shape_.sync == MirrorSync::full && shape_.target_is_zero) return {};
  return to_target(target_, target_.write_zeroes(extent.range, Zeroing::may_free));
}

}  // namespace imgfuse::job
