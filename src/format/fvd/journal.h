// The journal: sectors that each hold whole records, so that a torn write loses whole sectors only.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "format/fvd/layout.h"
#include "imgfuse/storage.h"

namespace imgfuse::fvd {

/// Most table entries of one record, with and without a bitmap record behind it.
inline constexpr uint64_t kEntriesPerSector = (kSector - sizeof(wire::TableRecord)) / 4;
inline constexpr uint64_t kEntriesBesideBitmap = (kSector - sizeof(wire::TableRecord) - sizeof(wire::BitmapRecord)) / 4;

/// What records say. Numbers are the file's: the caller checks them against the disk.
struct JournalReader {
  /// `entries` holds little-endian table entries.
  std::function<Result<>(uint64_t first_chunk, ConstBytes entries)> table;
  std::function<Result<>(uint64_t first_sector, uint64_t sectors)> bitmap;

  /// Reads one sector: records up to the end mark, an unknown word, or a bitmap record, behind which nothing counts.
  /// `number` is for messages.
  Result<> read_sector(ConstBytes sector, uint64_t number) const;
};

/// Writes zeros over what is not zero. Written ones, not a hole: a journal is written again and again, and holes would
/// cost the host a change of its own metadata each time.
Result<> clear_journal(Storage& storage, HostOffset where, uint64_t sectors);

/// Fills sectors with records, one behind the other. The bytes behind the last record are zeros.
class JournalWriter {
 public:
  explicit JournalWriter(std::vector<std::byte>& sectors) : sectors_(sectors) {}

  /// Bytes left in the sector being filled.
  uint64_t room() const { return room_; }
  void start_sector();
  /// Must fit. `entry(i)` gives the i-th entry.
  template <class Entry>
  void add_table(uint64_t first_chunk, uint64_t count, Entry entry);
  /// Must fit; ends the sector.
  void add_bitmap(uint64_t first_sector, uint64_t sectors);

 private:
  std::byte* take(uint64_t bytes);

  std::vector<std::byte>& sectors_;
  uint64_t room_ = 0;
};

template <class Entry>
void JournalWriter::add_table(uint64_t first_chunk, uint64_t count, Entry entry) {
  const wire::TableRecord record{kTableRecord, static_cast<uint32_t>(first_chunk), static_cast<uint32_t>(count)};
  std::memcpy(take(sizeof record), &record, sizeof record);
  for (uint64_t i = 0; i < count; ++i) {
    const le<uint32_t> value(entry(first_chunk + i));
    std::memcpy(take(sizeof value), &value, sizeof value);
  }
}

}  // namespace imgfuse::fvd
