// Where the parts of FVD images lie.
#pragma once

#include <cstdint>

#include "support/little_endian.h"

namespace imgfuse::test {

/// Where the fields of the header lie.
inline constexpr uint64_t kAllData = 8, kSize = 12, kMetadataSize = 20, kBaseName = 28, kBaseFormat = 1052,
                          kBaseSize = 1068, kBitmapOffset = 1076, kBitmapSize = 1084, kBlockSize = 1092,
                          kCopyOnRead = 1096, kDataName = 1108, kDataFormat = 2132, kCompact = 2208,
                          kTableOffset = 2212, kChunkSize = 2220, kGrowUnit = 2228, kCommand = 2236,
                          kJournalOffset = 4284, kJournalSize = 4292, kClean = 4300, kNeedZeroInit = 4304;

inline constexpr uint32_t kBitmapType = 0x3F2AB8ED, kTableType = 0xB4E6F7AC;

inline uint64_t journal_of(const MemImage& image) { return peek_le<uint64_t>(image, kJournalOffset); }
inline uint64_t table_of(const MemImage& image) { return peek_le<uint64_t>(image, kTableOffset); }

}  // namespace imgfuse::test
