// Moving what an overlay holds into the image below it, and the other way round before its backing file is replaced.
#include <algorithm>

#include "base/buffer.h"
#include "imgfuse/job.h"
#include "job/crew.h"
#include "job/pairs.h"

namespace imgfuse {
namespace {

using job::Pair;
using job::Piece;

/// Longest stretch whose extents are listed at once.
constexpr uint64_t kStep = uint64_t{64} << 20;

/// Calls `work` on `range` in pieces of at most `step`, which begin at multiples of it.
template <class Work>
Result<> in_steps(GuestRange range, uint64_t step, Work&& work) {
  while (!range.empty()) {
    const uint64_t length = std::min(range.length, step - range.begin.bytes() % step);
    IMG_TRY(work(GuestRange{range.begin, length}));
    range = {range.begin + length, range.length - length};
  }
  return {};
}

/// Copies what lies above the base, to the byte: what surrounds it is not known here.
Result<> copy_down(Disk& overlay, Disk& base, uint32_t layers, const Piece& piece, Buffer& buffer) {
  buffer.reserve(job::kPiece);
  for (const Extent& extent : piece.extents) {
    if (extent.kind == ExtentKind::data) {
      const Bytes content = buffer.bytes().first(extent.range.length);
      IMG_TRY(overlay.read(extent.range.begin, content));
      IMG_TRY(base.write(extent.range.begin, content));
      continue;
    }
    // A hole in the lowest layer lets the base show. In a higher one it is the end of the layer below: zeros.
    const bool shows_base = extent.kind == ExtentKind::hole && extent.depth + 1 == layers;
    if (!shows_base) IMG_TRY(base.write_zeroes(extent.range, Zeroing::may_free));
  }
  return {};
}

/// Keeps what an overlay reads as when its backing file is replaced.
class Keeper {
 public:
  Keeper(Disk& overlay, Disk* new_backing)
      : overlay_(overlay), new_backing_(new_backing), unit_(overlay.info().cluster_size) {}

  Result<> work(const Piece& piece, Buffer& buffer);

 private:
  Result<> keep_extents(GuestRange range, Buffer& buffer);
  Result<> keep_pair(const Pair& pair, Buffer& buffer);
  Result<> keep_unit(const Pair& pair, GuestRange unit, Buffer& buffer);
  Result<> keep_zeroes(const Pair& pair, GuestRange unit);
  static bool own(const Extent& extent) { return extent.depth == 0 && extent.kind != ExtentKind::hole; }

  Disk& overlay_;
  Disk* const new_backing_;
  const uint64_t unit_;
};

Result<> Keeper::work(const Piece& piece, Buffer& buffer) {
  return in_steps(piece.range, kStep, [&](GuestRange step) { return keep_extents(step, buffer); });
}

Result<> Keeper::keep_extents(GuestRange range, Buffer& buffer) {
  IMG_LET(const std::vector<Extent> now, job::extents_of(&overlay_, range));
  IMG_LET(const std::vector<Extent> then, job::extents_of(new_backing_, range));
  for (const Pair& pair : job::pair_up(now, then))
    if (!own(pair.a) && !pair.both_zero()) IMG_TRY(keep_pair(pair, buffer));
  return {};
}

Result<> Keeper::keep_pair(const Pair& pair, Buffer& buffer) {
  buffer.reserve(2 * unit_);
  return in_steps(pair.range, unit_, [&](GuestRange unit) { return keep_unit(pair, unit, buffer); });
}

Result<> Keeper::keep_unit(const Pair& pair, GuestRange unit, Buffer& buffer) {
  const Bytes now = buffer.bytes().first(unit.length);
  const Bytes then = buffer.bytes().subspan(unit_, unit.length);
  IMG_TRY(overlay_.read(unit.begin, now));
  IMG_TRY(job::read_or_zero(new_backing_, unit.begin, then));
  if (std::equal(now.begin(), now.end(), then.begin())) return {};
  return is_zero(now) ? keep_zeroes(pair, unit) : overlay_.write(unit.begin, now);
}

/// Past the end of the old backing file zeroing has nothing to do, so there the zeros are asked for as space.
Result<> Keeper::keep_zeroes(const Pair& pair, GuestRange unit) {
  if (pair.a.kind == ExtentKind::hole && pair.a.depth == 0) return overlay_.populate(unit);
  return overlay_.write_zeroes(unit, Zeroing::may_free);
}

}  // namespace

Result<> commit(Disk& overlay, Disk& base, uint32_t layers, const Progress& progress) {
  if (base.size() < overlay.size()) {
    IMG_TRY(base.resize(overlay.size()));
  }
  IMG_TRY(job::for_each_piece(overlay, {}, kDefaultWorkers, progress, [&](const Piece& piece, Buffer& buffer) {
    return copy_down(overlay, base, layers, piece, buffer);
  }));
  return base.flush();
}

Result<> prepare_rebase(Disk& overlay, Disk* new_backing, const Progress& progress) {
  Keeper keeper(overlay, new_backing);
  const uint64_t piece = std::max<uint64_t>(job::kPiece, overlay.info().cluster_size);
  IMG_TRY(job::for_each_piece(overlay, {.size = piece}, kDefaultWorkers, progress,
                              [&](const Piece& p, Buffer& buffer) { return keeper.work(p, buffer); }));
  return overlay.flush();
}

}  // namespace imgfuse
