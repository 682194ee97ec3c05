#include "format/fvd/journal.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "base/buffer.h"

namespace imgfuse::fvd {

Result<> JournalReader::read_sector(ConstBytes sector, uint64_t number) const {
  for (size_t at = 0; at + sizeof(uint32_t) <= sector.size();) {
    le<uint32_t> type;
    std::memcpy(&type, sector.data() + at, sizeof type);
    const size_t left = sector.size() - at;
    if (type == kBitmapRecord) {
      wire::BitmapRecord record;
      if (left < sizeof record)
        return fail(ErrorCode::corrupt, "journal sector {}: a bitmap record at byte {} runs past its end", number, at);
      std::memcpy(&record, sector.data() + at, sizeof record);
      return bitmap(record.first_sector, record.sectors);
    }
    if (type != kTableRecord) return {};
    wire::TableRecord record;
    if (left < sizeof record)
      return fail(ErrorCode::corrupt, "journal sector {}: a table record at byte {} runs past its end", number, at);
    std::memcpy(&record, sector.data() + at, sizeof record);
    if (record.count > (left - sizeof record) / 4)
      return fail(ErrorCode::corrupt, "journal sector {}: a table record of {} entries at byte {} runs past its end",
                  number, uint32_t{record.count}, at);
    const size_t length = size_t{record.count} * 4;
    if (auto applied = table(record.first, sector.subspan(at + sizeof record, length)); !applied)
      return fail(applied.error().during("journal sector {}", number));
    at += sizeof record + length;
  }
  return {};
}

Result<> clear_journal(Storage& storage, HostOffset where, uint64_t sectors) {
  Buffer piece(std::min<uint64_t>(sectors * kSector, 1 << 20));
  for (HostRange left{where, sectors * kSector}; !left.empty();) {
    IMG_LET(const StorageExtent extent, storage.extent(left));
    uint64_t length = extent.length;
    if (extent.data) {
      length = std::min<uint64_t>(length, piece.size());
      const Bytes part = piece.bytes().first(length);
      IMG_TRY(storage.read(left.begin, part));
      if (!is_zero(part)) IMG_TRY(storage.write(left.begin, zeroes(length)));
    }
    left = {left.begin + length, left.length - length};
  }
  return {};
}

void JournalWriter::start_sector() {
  sectors_.resize(sectors_.size() + kSector);
  room_ = kSector;
}

std::byte* JournalWriter::take(uint64_t bytes) {
  assert(bytes <= room_);
  std::byte* const at = sectors_.data() + (sectors_.size() - room_);
  room_ -= bytes;
  return at;
}

void JournalWriter::add_bitmap(uint64_t first_sector, uint64_t sectors) {
  const wire::BitmapRecord record{kBitmapRecord, static_cast<uint32_t>(sectors), first_sector};
  std::memcpy(take(sizeof record), &record, sizeof record);
  room_ = 0;
}

}  // namespace imgfuse::fvd
