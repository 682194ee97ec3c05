// FVD version 1 as it lies on disk. All integers are little endian. FORMAT.md explains.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/endian.h"

namespace imgfuse::fvd {

inline constexpr uint32_t kMagic = 0x5143F5A9;
inline constexpr uint32_t kVersion = 1;
inline constexpr uint64_t kSector = 512;
inline constexpr uint64_t kPage = 4096;

inline constexpr uint32_t kEmpty = 0xFFFFFFFF;     ///< table entry: no storage
inline constexpr uint32_t kDirtyBit = 0x80000000;  ///< in journal records; means nothing to a reader
inline constexpr uint32_t kMaxChunk = 0x7FFFFFFE;

inline constexpr uint32_t kBitmapRecord = 0x3F2AB8ED;
inline constexpr uint32_t kTableRecord = 0xB4E6F7AC;

namespace wire {

/// Signed fields are read as unsigned ones and refused when their top bit is set; there is no negative size.
struct Header {
  le<uint32_t> magic;
  le<uint32_t> version;
  le<uint32_t> all_data_in_image;  ///< base and bitmap are not used
  le<uint64_t> virtual_size;
  le<uint64_t> metadata_size;
  char base_name[1024];
  char base_format[16];
  le<uint64_t> base_size;
  le<uint64_t> bitmap_offset;
  le<uint64_t> bitmap_size;
  le<uint32_t> block_size;
  le<uint32_t> copy_on_read;
  le<uint64_t> max_outstanding_copy_on_read;
  char data_name[1024];
  char data_format[16];
  le<uint32_t> prefetch_start_delay;
  le<uint64_t> profile_offset;
  le<uint64_t> profile_entries;
  le<uint32_t> prefetch_slots;
  le<uint32_t> bytes_per_prefetch;
  le<uint32_t> read_measure_time;
  le<uint32_t> write_measure_time;
  le<uint32_t> average_alpha;
  le<uint32_t> min_read_throughput;
  le<uint32_t> min_write_throughput;
  le<uint32_t> max_read_throughput;
  le<uint32_t> max_write_throughput;
  le<uint32_t> throttle_time;
  le<uint32_t> compact;
  le<uint64_t> table_offset;
  le<uint64_t> chunk_size;
  le<uint64_t> storage_grow_unit;
  char add_storage_command[2048];
  le<uint64_t> journal_offset;
  le<uint64_t> journal_size;
  le<uint32_t> clean_shutdown;
  le<uint32_t> need_zero_init;
  le<uint32_t> generate_profile;
  le<uint32_t> profile_entry_unit;
  le<uint32_t> profile_start_delay;
  char unused[16];
};
static_assert(sizeof(Header) == 4336 && alignof(Header) == 1);
static_assert(offsetof(Header, base_size) == 1068);
static_assert(offsetof(Header, data_name) == 1108);
static_assert(offsetof(Header, prefetch_start_delay) == 2148);
static_assert(offsetof(Header, compact) == 2208);
static_assert(offsetof(Header, journal_offset) == 4284);
static_assert(offsetof(Header, clean_shutdown) == 4300);

/// A run of neighbouring sectors whose blocks are in the image. Must be the last record of its journal sector.
struct BitmapRecord {
  le<uint32_t> type;
  le<uint32_t> sectors;
  le<uint64_t> first_sector;
};
static_assert(sizeof(BitmapRecord) == 16);

/// Followed by `count` table entries.
struct TableRecord {
  le<uint32_t> type;
  le<uint32_t> first;
  le<uint32_t> count;
};
static_assert(sizeof(TableRecord) == 12);

}  // namespace wire

inline constexpr uint64_t kHeaderBytes = sizeof(wire::Header);
inline constexpr uint64_t kHeaderRegion = 8192;

}  // namespace imgfuse::fvd
