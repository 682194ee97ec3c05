// The directory of persistent dirty bitmaps (section 20), as checked, native values.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "format/qcow2/header.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"
#include "imgfuse/units.h"

namespace imgfuse::qcow2 {

inline constexpr uint32_t kMaxBitmaps = 65535;
inline constexpr uint64_t kMaxBitmapDirectoryBytes = uint64_t{65535} << 10;
inline constexpr uint32_t kMaxBitmapTableEntries = uint32_t{1} << 27;
inline constexpr uint64_t kMaxBitmapBytes = uint64_t{512} << 20;
inline constexpr size_t kMaxBitmapName = 1023;
inline constexpr unsigned kMinGranularityBits = 9;
inline constexpr unsigned kMaxGranularityBits = 31;

/// Flags of a bitmap.
inline constexpr uint32_t kBitmapInUse = 1 << 0;  ///< a writer has it open, or has crashed: the content is stale
inline constexpr uint32_t kBitmapAuto = 1 << 1;   ///< every writer records in it
inline constexpr uint32_t kBitmapExtraCompatible = 1 << 2;
inline constexpr uint8_t kDirtyTracking = 1;

/// One bitmap, as the directory has it.
struct BitmapEntry {
  std::string name;
  HostRange table;  ///< 8 bytes per cluster of bits
  uint32_t flags = 0;
  uint8_t type = kDirtyTracking;
  uint8_t granularity_bits = 16;
  std::vector<std::byte> extra;  ///< unknown, kept

  /// Guest bytes per bit; 0 if the directory says something impossible.
  uint64_t granularity() const { return granularity_bits < 64 ? uint64_t{1} << granularity_bits : 0; }
  /// In the directory.
  uint64_t stored_bytes() const;
};

struct BitmapDirectory {
  HostRange range;
  std::vector<BitmapEntry> bitmaps;
  std::vector<HostRange> tables;  ///< theirs, in the same order
};

/// Nothing unless the image says that its bitmaps are valid. Places and lengths are within the limits; whether imgfuse
/// can keep a bitmap is check_bitmap()'s question. Memory: in proportion to the directory.
Result<std::optional<BitmapDirectory>> read_bitmap_directory(Storage& storage, const Header& header);

/// Why the content of a bitmap cannot be used, although the directory is whole.
Result<> check_bitmap(const Header& header, const BitmapEntry& bitmap);

std::vector<std::byte> encode_bitmap_directory(const std::vector<BitmapEntry>& bitmaps);
/// The header extension that points at a directory.
Extension bitmaps_extension(size_t count, HostRange directory);

/// Entries of the table of a bitmap for a disk of `size` bytes.
uint64_t bitmap_table_entries(uint64_t size, unsigned granularity_bits, uint64_t cluster_size);

}  // namespace imgfuse::qcow2
