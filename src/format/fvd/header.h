// The header: read, checked, and as native values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "base/math.h"
#include "format/fvd/layout.h"
#include "imgfuse/background_copy.h"
#include "imgfuse/storage.h"

namespace imgfuse::fvd {

/// Most bytes of a table or a bitmap, which are kept in memory.
inline constexpr uint64_t kMaxTable = uint64_t{1} << 30;

struct Header {
  bool all_data_in_image = true;
  uint64_t virtual_size = 0;
  uint64_t metadata_size = 0;
  std::string base_name;  ///< empty: none
  std::string base_format;
  uint64_t base_size = 0;  ///< as stored; may be more than the disk's size
  uint64_t bitmap_offset = 0;
  uint64_t bitmap_size = 0;
  uint32_t block_size = 0;
  std::string data_name;  ///< empty: data lie in the image file
  std::string data_format;
  bool compact = false;
  uint64_t table_offset = 0;
  uint64_t chunk_size = 0;
  uint64_t storage_grow_unit = 0;
  std::string add_storage_command;
  uint64_t journal_offset = 0;
  uint64_t journal_size = 0;
  bool clean_shutdown = true;
  bool need_zero_init = false;
  CopySettings copying;

  bool uses_base() const { return !all_data_in_image; }
  /// What of the disk can be in the base, in bytes.
  uint64_t base_end() const { return uses_base() ? std::min(base_size, virtual_size) : 0; }
  uint64_t blocks() const { return uses_base() ? divide_up(base_end(), block_size) : 0; }
  uint64_t chunks() const { return compact ? divide_up(virtual_size, chunk_size) : 0; }
  /// Where guest data begin in the file that they lie in.
  uint64_t data_start() const { return data_name.empty() ? round_down(metadata_size, kSector) : 0; }
  /// The journal is looked at only where there is something that it could be about.
  uint64_t journal_sectors() const { return uses_base() || compact ? journal_size / kSector : 0; }
  uint64_t table_bytes() const { return chunks() * 4; }
  uint64_t bitmap_bytes() const { return divide_up(blocks(), 8); }
  /// Room for the table up to whatever comes behind it, in bytes.
  uint64_t table_room() const;
};

/// Reads and checks: every number is in a sensible range, every region inside the metadata and the file and apart from
/// the others. Files of other layouts are refused by their names.
Result<Header> read_header(Storage& storage);

/// For creation.
wire::Header encode(const Header& header);

/// Where single fields are written.
inline constexpr HostOffset kAllDataField{offsetof(wire::Header, all_data_in_image)};
inline constexpr HostOffset kSizeField{offsetof(wire::Header, virtual_size)};
inline constexpr HostOffset kBaseSizeField{offsetof(wire::Header, base_size)};
inline constexpr HostOffset kJournalFields{offsetof(wire::Header, journal_offset)};
inline constexpr HostOffset kCleanField{offsetof(wire::Header, clean_shutdown)};

template <class T>
Result<> write_field(Storage& storage, HostOffset where, T value) {
  const le<T> field(value);
  return storage.write(where, std::as_bytes(std::span(&field, 1)));
}

}  // namespace imgfuse::fvd
