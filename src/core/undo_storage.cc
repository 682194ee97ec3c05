#include "core/undo_storage.h"

#include <algorithm>
#include <cstring>

#include "base/buffer.h"
#include "base/math.h"
#include "core/codec.h"

namespace imgfuse {
namespace {

constexpr uint64_t kSector = 512;

/// Of all pieces as they are in the image, in the journal's order.
Result<uint32_t> checksum_of_pieces(Storage& image, const UndoJournal& journal) {
  uint32_t sum = 0;
  Buffer bytes(UndoJournal::kMaxPiece);
  for (const UndoJournal::Piece& piece : journal.pieces()) {
    const Bytes content = bytes.bytes().first(piece.range.length);
    IMG_TRY(image.read(piece.range.begin, content));
    sum = codec::crc32(content, sum);
  }
  return sum;
}

Result<UndoJournal::Left> left_now(Storage& image, const UndoJournal& journal, uint64_t modified) {
  UndoJournal::Left left{.modified = modified};
  IMG_LET(left.size, image.size());
  IMG_LET(left.contents, checksum_of_pieces(image, journal));
  return left;
}

}  // namespace

HostRange UndoStorage::inside_image(HostRange range) const {
  const uint64_t begin = std::min(range.begin.bytes(), journal_.image_size());
  return {range.begin, std::min(range.length, journal_.image_size() - begin)};
}

/// Records the sectors from the first to the last one that differ.
Result<> UndoStorage::keep_changed(HostOffset offset, ConstBytes new_bytes) {
  while (!new_bytes.empty()) {
    const HostRange range = inside_image({offset, std::min<uint64_t>(new_bytes.size(), UndoJournal::kMaxPiece)});
    if (range.empty()) return {};
    Buffer old_bytes(range.length);
    IMG_TRY(inner_.read(offset, old_bytes.bytes()));
    const auto new_end = new_bytes.begin() + static_cast<ptrdiff_t>(range.length);
    const auto [first, in_old] = std::mismatch(new_bytes.begin(), new_end, old_bytes.bytes().begin());
    if (first != new_end) {
      uint64_t last = range.length;
      while (new_bytes[last - 1] == old_bytes.bytes()[last - 1]) --last;
      const uint64_t begin = round_down(offset.bytes() + static_cast<uint64_t>(first - new_bytes.begin()), kSector);
      const uint64_t end = round_up(offset.bytes() + last, kSector);
      IMG_TRY(keep(inside_image({HostOffset(begin), end - begin})));
    }
    new_bytes = new_bytes.subspan(range.length);
    offset = offset + range.length;
  }
  return {};
}

/// Records what is not a hole.
Result<> UndoStorage::keep_data(HostRange range) {
  range = inside_image(range);
  while (!range.empty()) {
    IMG_LET(StorageExtent extent, inner_.extent(range));
    if (extent.length == 0) extent = {range.length, true};
    extent.length = std::min(extent.length, range.length);
    if (extent.data) IMG_TRY(keep({range.begin, extent.length}));
    range = {range.begin + extent.length, range.length - extent.length};
  }
  return {};
}

/// Records the parts of the range that are not yet in the journal.
Result<> UndoStorage::keep(HostRange range) {
  uint64_t at = range.begin.bytes();
  const uint64_t end = range.end().bytes();
  while (at < end) {
    const auto next = kept_.upper_bound(at);
    if (next != kept_.begin() && std::prev(next)->second > at) {
      at = std::prev(next)->second;
      continue;
    }
    const uint64_t gap_end = std::min({end, next == kept_.end() ? end : next->first, at + UndoJournal::kMaxPiece});
    IMG_TRY(keep_piece({HostOffset(at), gap_end - at}));
    at = gap_end;
  }
  return {};
}

Result<> UndoStorage::keep_piece(HostRange range) {
  Buffer bytes(range.length);
  IMG_TRY(inner_.read(range.begin, bytes.bytes()));
  if (unflushed_ + range.length > UndoJournal::kMaxUnflushed / 2) IMG_TRY(make_durable());
  unflushed_ += range.length;
  IMG_TRY(journal_.add(range.begin, bytes.bytes()));
  uint64_t begin = range.begin.bytes();
  uint64_t end = range.end().bytes();
  if (const auto behind = kept_.find(end); behind != kept_.end()) {
    end = behind->second;
    kept_.erase(behind);
  }
  if (const auto before = kept_.lower_bound(begin); before != kept_.begin() && std::prev(before)->second == begin) {
    begin = std::prev(before)->first;
  }
  kept_[begin] = end;
  return {};
}

Result<> UndoStorage::make_durable() {
  if (unflushed_ == 0) return {};
  IMG_TRY(journal_.flush());
  unflushed_ = 0;
  return {};
}

Result<> UndoStorage::write(HostOffset offset, std::span<const ConstBytes> parts) {
  HostOffset at = offset;
  for (const ConstBytes part : parts) {
    IMG_TRY(keep_changed(at, part));
    at = at + part.size();
  }
  IMG_TRY(make_durable());
  return inner_.write(offset, parts);
}

Result<> UndoStorage::write_zeroes(HostRange range) {
  IMG_TRY(keep_data(range));
  IMG_TRY(make_durable());
  return inner_.write_zeroes(range);
}

Result<> UndoStorage::discard(HostRange range) {
  IMG_TRY(keep_data(range));
  IMG_TRY(make_durable());
  return inner_.discard(range);
}

Result<> UndoStorage::resize(uint64_t size) {
  if (size < journal_.image_size()) IMG_TRY(keep_data({HostOffset(size), journal_.image_size() - size}));
  IMG_TRY(make_durable());
  return inner_.resize(size);
}

Result<> UndoStorage::finish(uint64_t modified) {
  IMG_TRY(inner_.flush());
  IMG_LET(const UndoJournal::Left left, left_now(inner_, journal_, modified));
  return journal_.finish(left);
}

Result<UndoReport> undo_changes(Storage& image, UndoJournal& journal, uint64_t modified) {
  using State = UndoJournal::State;
  if (journal.state() == State::undone)
    return fail(ErrorCode::invalid, "the repair of {} was taken back already", journal.image_name());
  IMG_TRY(journal.check_belongs_to(image));
  if (journal.state() == State::finished) {
    IMG_LET(const UndoJournal::Left now, left_now(image, journal, modified));
    if (now != journal.left())
      return fail(ErrorCode::invalid,
                  "the image has been changed since the repair; taking back the repair would mix the two");
  }

  if (journal.state() != State::undoing) IMG_TRY(journal.mark(State::undoing));
  UndoReport report{.size = journal.image_size()};
  Buffer bytes(UndoJournal::kMaxPiece);
  for (const UndoJournal::Piece& piece : journal.pieces()) {
    const Bytes old_bytes = bytes.bytes().first(piece.range.length);
    IMG_TRY(journal.read_old(piece, old_bytes));
    IMG_TRY(image.write(piece.range.begin, old_bytes));
    ++report.pieces;
    report.bytes += piece.range.length;
  }
  IMG_LET(const uint64_t size, image.size());
  if (size != journal.image_size()) {
    IMG_TRY(image.flush());  // a shorter image must not be there before its old bytes are
    IMG_TRY(image.resize(journal.image_size()));
  }
  IMG_TRY(image.flush());
  IMG_TRY(journal.mark(State::undone));
  return report;
}

}  // namespace imgfuse
