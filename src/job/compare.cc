// Whether two disks read alike.
#include <algorithm>
#include <cstring>
#include <limits>

#include "base/buffer.h"
#include "base/mutex.h"
#include "imgfuse/job.h"
#include "job/crew.h"
#include "job/pairs.h"

namespace imgfuse {
namespace {

using job::Pair;
using job::Piece;

/// Longest stretch whose extents are listed at once.
constexpr uint64_t kStep = uint64_t{64} << 20;

size_t first_difference(ConstBytes a, ConstBytes b) {
  return static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin()).first - a.begin());
}

bool allocated_alike(const Pair& pair) {
  return pair.a.kind == pair.b.kind && pair.a.has_host_offset == pair.b.has_host_offset;
}

/// Finds the first difference. Pieces are dealt out in order: when one differs, all before it have been looked at or
/// are being looked at, so the rest need not be.
class Compare {
 public:
  Compare(Disk& longer, Disk& shorter, bool strict) : longer_(longer), shorter_(shorter), strict_(strict) {}

  /// An error means no more than that there is nothing left to do.
  Result<> work(const Piece& piece, Buffer& buffer);
  Comparison result() EXCLUDES(mutex_) {
    Lock lock(mutex_);
    return found_;
  }

 private:
  Result<> compare_extents(const std::vector<Extent>& extents, GuestRange range, Buffer& buffer);
  Result<> compare_content(const Pair& pair, Buffer& buffer);
  Result<> found(Verdict verdict, GuestOffset offset, std::optional<Error> error = {}) EXCLUDES(mutex_);

  Disk& longer_;
  Disk& shorter_;
  const bool strict_;

  Mutex mutex_;
  Comparison found_ GUARDED_BY(mutex_) = {.offset = std::numeric_limits<uint64_t>::max()};
};

Result<> Compare::found(Verdict verdict, GuestOffset offset, std::optional<Error> error) {
  Lock lock(mutex_);
  if (offset.bytes() < found_.offset)
    found_ = {.verdict = verdict, .offset = offset.bytes(), .error = std::move(error)};
  return fail(ErrorCode::invalid, "the disks differ");
}

Result<> Compare::work(const Piece& piece, Buffer& buffer) {
  if (piece.extents.size() > 1 || piece.range.length <= kStep)
    return compare_extents(piece.extents, piece.range, buffer);
  for (GuestRange rest = piece.range; !rest.empty();) {
    std::vector<Extent> part = piece.extents;
    part.front().range = {rest.begin, std::min(rest.length, kStep)};
    IMG_TRY(compare_extents(part, part.front().range, buffer));
    rest = {part.front().range.end(), rest.end() - part.front().range.end()};
  }
  return {};
}

Result<> Compare::compare_extents(const std::vector<Extent>& extents, GuestRange range, Buffer& buffer) {
  const auto others = job::extents_of(&shorter_, range);
  if (!others) return found(Verdict::map_failed, range.begin, others.error());
  for (const Pair& pair : job::pair_up(extents, *others)) {
    if (strict_ && !allocated_alike(pair)) return found(Verdict::allocation_differs, pair.range.begin);
    if (!pair.both_zero()) IMG_TRY(compare_content(pair, buffer));
  }
  return {};
}

Result<> Compare::compare_content(const Pair& pair, Buffer& buffer) {
  buffer.reserve(2 * job::kPiece);
  for (GuestRange rest = pair.range; !rest.empty();) {
    const size_t length = std::min(rest.length, job::kPiece);
    const auto side = [&](Disk& disk, const Extent& extent, Bytes space) -> Result<ConstBytes> {
      if (extent.kind != ExtentKind::data) return zeroes(length);
      IMG_TRY(disk.read(rest.begin, space));
      return ConstBytes(space);
    };
    const auto a = side(longer_, pair.a, buffer.bytes().first(length));
    if (!a) return found(Verdict::read_failed, rest.begin, a.error());
    const auto b = side(shorter_, pair.b, buffer.bytes().subspan(job::kPiece, length));
    if (!b) return found(Verdict::read_failed, rest.begin, b.error());
    if (std::memcmp(a->data(), b->data(), length) != 0)
      return found(Verdict::content_differs, rest.begin + first_difference(*a, *b));
    rest = {rest.begin + length, rest.length - length};
  }
  return {};
}

}  // namespace

Comparison compare(Disk& a, Disk& b, const CompareOptions& options, const Progress& progress) {
  const bool sizes_differ = a.size() != b.size();
  if (sizes_differ && options.strict)
    return {.verdict = Verdict::size_differs, .offset = std::min(a.size(), b.size()), .sizes_differ = true};
  const bool a_is_longer = a.size() >= b.size();
  Compare compare(a_is_longer ? a : b, a_is_longer ? b : a, options.strict);
  const auto done =
      job::for_each_piece(a_is_longer ? a : b, {}, options.workers, progress,
                          [&](const Piece& piece, Buffer& buffer) { return compare.work(piece, buffer); });
  Comparison result = compare.result();
  if (result.verdict == Verdict::same && !done)
    result = {.verdict = Verdict::map_failed, .offset = 0, .error = done.error()};
  if (result.verdict == Verdict::same) result.offset = 0;
  result.sizes_differ = sizes_differ;
  return result;
}

}  // namespace imgfuse
