#include "core/undo_journal.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cstddef>
#include <cstring>
#include <span>

#include "base/buffer.h"
#include "base/endian.h"
#include "core/codec.h"

namespace imgfuse {
namespace {

constexpr uint64_t kMagic = 0x494d47554e444f31;  // "IMGUNDO1"
constexpr uint32_t kOldBytes = 1;
constexpr uint64_t kSample = uint64_t{64} << 10;
constexpr uint32_t kMaxName = 4096;

struct WireHeader {
  be<uint64_t> magic;
  be<uint64_t> image_size;
  be<uint32_t> front;
  be<uint32_t> back;
  be<uint32_t> name_length;
  be<uint32_t> checksum;  // of the above and the name, which follows
};
static_assert(sizeof(WireHeader) == 32);

struct WireRecord {
  be<uint32_t> kind;
  be<uint32_t> length;  // of the data that follows
  be<uint64_t> offset;
  be<uint32_t> data_checksum;
  be<uint32_t> checksum;  // of the above
};
static_assert(sizeof(WireRecord) == 24);

/// The data of a `finished` record.
struct WireLeft {
  be<uint64_t> size;
  be<uint64_t> modified;
  be<uint32_t> contents;
};
static_assert(sizeof(WireLeft) == 20);

template <class T>
ConstBytes bytes_of(const T& value) {
  return std::as_bytes(std::span(&value, 1));
}

/// Of the fields before the checksum.
template <class T>
uint32_t own_checksum(const T& wire) {
  return codec::crc32(bytes_of(wire).first(offsetof(T, checksum)));
}

HostRange front_sample(uint64_t size) { return {HostOffset(0), std::min(size, kSample)}; }
HostRange back_sample(uint64_t size) {
  const uint64_t length = std::min(size, kSample);
  return {HostOffset(size - length), length};
}

}  // namespace

Result<UndoJournal> UndoJournal::create(Storage& file, Storage& image) {
  UndoJournal journal(file);
  IMG_LET(journal.image_size_, image.size());
  IMG_LET(journal.front_, journal.original_checksum(image, front_sample(journal.image_size_)));
  IMG_LET(journal.back_, journal.original_checksum(image, back_sample(journal.image_size_)));
  journal.image_name_ = image.info().name.substr(0, kMaxName);

  WireHeader header;
  header.magic = kMagic;
  header.image_size = journal.image_size_;
  header.front = journal.front_;
  header.back = journal.back_;
  header.name_length = static_cast<uint32_t>(journal.image_name_.size());
  const ConstBytes name = std::as_bytes(std::span(journal.image_name_));
  header.checksum = codec::crc32(name, own_checksum(header));
  IMG_TRY(file.write(HostOffset(0), std::array{bytes_of(header), name}));
  IMG_TRY(file.flush());
  journal.end_ = sizeof header + name.size();
  return journal;
}

Result<UndoJournal> UndoJournal::open(Storage& file) {
  UndoJournal journal(file);
  IMG_TRY(journal.read_header());
  IMG_LET(const uint64_t size, file.size());
  for (bool more = true; more && journal.end_ < size;) {
    IMG_LET(more, journal.read_record(size));
  }
  return journal;
}

Result<> UndoJournal::read_header() {
  WireHeader header;
  IMG_TRY(file_->read(HostOffset(0), std::as_writable_bytes(std::span(&header, 1))));
  if (header.magic != kMagic) return fail(ErrorCode::invalid, "it is not an undo journal");
  const uint32_t name_length = std::min<uint32_t>(header.name_length, kMaxName);
  image_name_.resize(name_length);
  const Bytes name = std::as_writable_bytes(std::span(image_name_));
  IMG_TRY(file_->read(HostOffset(sizeof header), name));
  if (header.name_length > kMaxName || header.checksum != codec::crc32(name, own_checksum(header)))
    return fail(ErrorCode::corrupt, "the undo journal's header is damaged");
  image_size_ = header.image_size;
  front_ = header.front;
  back_ = header.back;
  end_ = sizeof header + name_length;
  return {};
}

/// False at the torn end: some of what follows the last flush may be missing, which is no more than one change's
/// pieces, and nothing behind it counts.
Result<bool> UndoJournal::read_record(uint64_t file_size) {
  WireRecord record;
  IMG_TRY(file_->read(HostOffset(end_), std::as_writable_bytes(std::span(&record, 1))));
  bool whole = record.checksum == own_checksum(record);
  if (whole) {
    IMG_LET(whole, read_data(record.kind, {HostOffset(record.offset), record.length}, HostOffset(end_ + sizeof record),
                             record.data_checksum));
  }
  if (whole) {
    end_ += sizeof record + record.length;
    return true;
  }
  if (file_size - end_ > kMaxUnflushed)
    return fail(ErrorCode::corrupt, "the undo journal is damaged at {:#x}, {} bytes before its end", end_,
                file_size - end_);
  return false;
}

/// Takes the record over; false if its data are not what the checksum says.
Result<bool> UndoJournal::read_data(uint32_t kind, HostRange range, HostOffset stored, uint32_t wanted_checksum) {
  if (range.length > kMaxPiece)
    return fail(ErrorCode::corrupt, "the undo journal's record at {:#x} is {} bytes long", end_, range.length);
  Buffer data(range.length);
  IMG_TRY(file_->read(stored, data.bytes()));
  if (wanted_checksum != codec::crc32(data.bytes())) return false;
  switch (kind) {
    case kOldBytes:
      if (range.begin.bytes() > image_size_ || range.length > image_size_ - range.begin.bytes())
        return fail(ErrorCode::corrupt, "the undo journal's record at {:#x} is out of bounds", end_);
      pieces_.push_back({range, stored});
      return true;
    case static_cast<uint32_t>(State::finished): {
      WireLeft left;
      if (range.length != sizeof left)
        return fail(ErrorCode::corrupt, "the undo journal's record at {:#x} is {} bytes long", end_, range.length);
      std::memcpy(&left, data.data(), sizeof left);
      left_ = {left.contents, left.size, left.modified};
      break;
    }
    case static_cast<uint32_t>(State::undoing):
    case static_cast<uint32_t>(State::undone):
      break;
    default:
      return fail(ErrorCode::unsupported, "the undo journal has a record of the unknown kind {}", kind);
  }
  state_ = State{kind};
  return true;
}

Result<> UndoJournal::append(uint32_t kind, HostOffset offset, ConstBytes data) {
  WireRecord record;
  record.kind = kind;
  record.length = static_cast<uint32_t>(data.size());
  record.offset = offset.bytes();
  record.data_checksum = codec::crc32(data);
  record.checksum = own_checksum(record);
  IMG_TRY(file_->write(HostOffset(end_), std::array{bytes_of(record), data}));
  end_ += sizeof record + data.size();
  return {};
}

Result<> UndoJournal::add(HostOffset offset, ConstBytes old_bytes) {
  assert(old_bytes.size() <= kMaxPiece);
  const HostOffset stored(end_ + sizeof(WireRecord));
  IMG_TRY(append(kOldBytes, offset, old_bytes));
  pieces_.push_back({{offset, old_bytes.size()}, stored});
  return {};
}

Result<> UndoJournal::append_mark(State state, ConstBytes data) {
  // What a torn record left behind must not be taken for one.
  IMG_TRY(file_->resize(end_));
  IMG_TRY(append(static_cast<uint32_t>(state), HostOffset(0), data));
  IMG_TRY(file_->flush());
  state_ = state;
  return {};
}

Result<> UndoJournal::finish(const Left& left) {
  WireLeft wire;
  wire.size = left.size;
  wire.modified = left.modified;
  wire.contents = left.contents;
  IMG_TRY(append_mark(State::finished, bytes_of(wire)));
  left_ = left;
  return {};
}

/// Of the range as it was before the first change.
Result<uint32_t> UndoJournal::original_checksum(Storage& image, HostRange range) const {
  Buffer bytes(range.length);
  IMG_TRY(image.read(range.begin, bytes.bytes()));
  for (const Piece& piece : pieces_) {
    if (piece.range.empty() || !piece.range.overlaps(range)) continue;
    const HostOffset begin = std::max(piece.range.begin, range.begin);
    const HostOffset end = std::min(piece.range.end(), range.end());
    IMG_TRY(file_->read(piece.stored + (begin - piece.range.begin),
                        bytes.bytes().subspan(begin - range.begin, end - begin)));
  }
  return codec::crc32(bytes.bytes());
}

Result<> UndoJournal::check_belongs_to(Storage& image) const {
  const auto other = [&](const char* why) {
    return fail(ErrorCode::invalid, "the undo journal, made for {}, does not belong to this image: {}", image_name_,
                why);
  };
  IMG_LET(const uint64_t size, image.size());
  if (size != image_size_ && !image.info().extensible) return other("it has another size");
  IMG_LET(const uint32_t front, original_checksum(image, front_sample(image_size_)));
  if (front != front_) return other("its beginning differs");
  IMG_LET(const uint32_t back, original_checksum(image, back_sample(image_size_)));
  if (back != back_) return other("its end differs");
  return {};
}

}  // namespace imgfuse
