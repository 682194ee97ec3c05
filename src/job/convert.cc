// Copying one disk to another.
#include <algorithm>
#include <cstring>
#include <vector>

#include "imgfuse/job.h"
#include "job/crew.h"

namespace imgfuse {
namespace {

using job::Piece;

/// What becomes of one unit of the target.
enum class Fate { skip, zero, copy };

class Copy {
 public:
  Copy(Disk& source, Disk& target, const ConvertOptions& options)
      : source_(source),
        target_(target),
        options_(options),
        unit_(target.info().cluster_size),
        piece_(std::max<uint64_t>(job::kPiece, unit_)) {}

  job::Cuts cuts() const { return {piece_, options_.target_offset % piece_}; }
  Result<> work(const Piece& piece, Buffer& buffer);

 private:
  struct Run {
    GuestRange range;
    Fate fate;
  };
  bool left_out(const Extent& extent) const { return options_.same_backing && extent.depth > 0; }
  Fate fate(const Extent& extent) const {
    if (left_out(extent)) return Fate::skip;
    return extent.kind == ExtentKind::data ? Fate::copy : Fate::zero;
  }
  /// Of a whole piece: `copy` also for what has to be looked at unit by unit.
  Fate fate(const Piece& piece) const;
  Fate fate(const Piece& piece, GuestRange unit, ConstBytes content) const;
  GuestRange unit_at(GuestOffset at, GuestRange within) const;
  std::vector<Run> runs(const Piece& piece, ConstBytes content) const;
  Result<> read(const Piece& piece, Bytes out);
  Result<> apply(Fate fate, GuestRange range, ConstBytes content);
  Result<> zero(GuestRange target);

  Disk& source_;
  Disk& target_;
  const ConvertOptions options_;
  const uint64_t unit_;  // one cluster of the target: it is written as a whole, or it is not
  const uint64_t piece_;
};

Fate Copy::fate(const Piece& piece) const {
  const Fate first = fate(piece.extents.front());
  for (const Extent& extent : piece.extents)
    if (fate(extent) != first) return Fate::copy;
  return first;
}

Fate Copy::fate(const Piece& piece, GuestRange unit, ConstBytes content) const {
  if (options_.same_backing) {
    const bool nothing = std::all_of(piece.extents.begin(), piece.extents.end(), [&](const Extent& extent) {
      return !extent.range.overlaps(unit) || left_out(extent);
    });
    if (nothing) return Fate::skip;
  }
  return options_.sparse > 0 && is_zero(content) ? Fate::zero : Fate::copy;
}

/// Units begin at multiples of their size in the target.
GuestRange Copy::unit_at(GuestOffset at, GuestRange within) const {
  const uint64_t length = unit_ - (at.bytes() + options_.target_offset) % unit_;
  return {at, std::min(length, within.end() - at)};
}

/// What the piece reads as; the source is asked only where there is data, in as few calls as there can be.
Result<> Copy::read(const Piece& piece, Bytes out) {
  for (auto extent = piece.extents.begin(); extent != piece.extents.end();) {
    GuestRange run = extent->range;
    const bool data = extent->kind == ExtentKind::data;
    for (++extent; extent != piece.extents.end() && (extent->kind == ExtentKind::data) == data; ++extent)
      run.length += extent->range.length;
    const Bytes part = out.subspan(run.begin - piece.range.begin, run.length);
    if (data) {
      IMG_TRY(source_.read(run.begin, part));
    } else {
      std::memset(part.data(), 0, part.size());
    }
  }
  return {};
}

Result<> Copy::work(const Piece& piece, Buffer& buffer) {
  if (const Fate whole = fate(piece); whole != Fate::copy) return apply(whole, piece.range, {});
  buffer.reserve(piece_);
  const Bytes content = buffer.bytes().first(piece.range.length);
  IMG_TRY(read(piece, content));

  for (const Run& run : runs(piece, content))
    IMG_TRY(apply(run.fate, run.range, content.subspan(run.range.begin - piece.range.begin, run.range.length)));
  return {};
}

/// Neighbouring units of one fate are one run. Zeros between data are data if they are too short to be worth a hole.
std::vector<Copy::Run> Copy::runs(const Piece& piece, ConstBytes content) const {
  std::vector<Run> runs;
  const auto append = [&](const Run& next) {
    if (runs.size() >= 2 && next.fate == Fate::copy && runs.back().fate == Fate::zero &&
        runs.back().range.length < options_.sparse && runs[runs.size() - 2].fate == Fate::copy) {
      runs[runs.size() - 2].range.length += runs.back().range.length;
      runs.pop_back();
    }
    if (!runs.empty() && runs.back().fate == next.fate) {
      runs.back().range.length += next.range.length;
    } else {
      runs.push_back(next);
    }
  };
  for (GuestOffset at = piece.range.begin; at < piece.range.end();) {
    const GuestRange unit = unit_at(at, piece.range);
    append({unit, fate(piece, unit, content.subspan(unit.begin - piece.range.begin, unit.length))});
    at = unit.end();
  }
  return runs;
}

Result<> Copy::apply(Fate fate, GuestRange range, ConstBytes content) {
  if (range.empty()) return {};
  const GuestRange there{range.begin + options_.target_offset, range.length};
  switch (fate) {
    case Fate::skip:
      return {};
    case Fate::copy:
      return target_.write(there.begin, content);
    case Fate::zero:
      return zero(there);
  }
  return {};
}

Result<> Copy::zero(GuestRange range) {
  if (!options_.target_is_zero) {
    IMG_TRY(target_.write_zeroes(range, options_.sparse > 0 ? Zeroing::may_free : Zeroing::keep_allocation));
  }
  return options_.sparse > 0 ? Result<>{} : target_.populate(range);
}

}  // namespace

Result<> convert(Disk& source, Disk& target, const ConvertOptions& options, const Progress& progress) {
  const uint64_t size = source.size();
  if (options.target_offset > target.size() || size > target.size() - options.target_offset)
    return fail(ErrorCode::invalid, "the target of {} bytes is shorter than what is to be copied, {} bytes",
                target.size(), options.target_offset + size);
  Copy copy(source, target, options);
  return job::for_each_piece(source, copy.cuts(), options.workers, progress,
                             [&](const Piece& piece, Buffer& buffer) { return copy.work(piece, buffer); });
}

}  // namespace imgfuse
