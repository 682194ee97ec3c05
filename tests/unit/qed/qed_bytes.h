// Where the parts of QED images lie, and a sample of one.
#pragma once

#include <cstdint>

#include "support/builders.h"
#include "support/little_endian.h"

namespace imgfuse::test {

/// Places of header fields.
inline constexpr uint64_t kClusterSizeAt = 4, kTableSizeAt = 8, kHeaderSizeAt = 12, kFeaturesAt = 16, kCompatAt = 24,
                          kAutoclearAt = 32, kL1At = 40, kSizeAt = 48, kNameOffsetAt = 56, kNameLengthAt = 60;

inline uint64_t features_of(const MemImage& image) { return peek_le<uint64_t>(image, kFeaturesAt); }

/// A disk of 1 MiB in clusters of 64 KiB, with guest clusters 0, 1 and 3 as data, and 5 as zeros:
///
///   0  header   0x10000  L1, 2 clusters   0x30000  L2, 2 clusters   0x50000  0x60000  0x70000  data   0x80000  F
struct QedSample {
  static constexpr uint64_t kCluster = 65536, kL1 = 0x10000, kL2 = 0x30000, kData = 0x50000, kEnd = 0x80000;

  explicit QedSample(const std::optional<std::string>& backing = {})
      : image(make_qed({.size = 1_MiB, .cluster_size = 65536, .table_size = 2, .backing = backing})) {
    image.resize(kEnd);
    poke_le(image, kL1, kL2);
    set_l2(0, kData);
    set_l2(1, kData + kCluster);
    set_l2(3, kData + 2 * kCluster);
    set_l2(5, 1);
    image.write(kData, pattern(3 * kCluster));
  }
  void set_l2(uint64_t index, uint64_t entry) { poke_le(image, kL2 + index * 8, entry); }
  uint64_t l2(uint64_t index) const { return peek_le<uint64_t>(image, kL2 + index * 8); }
  /// What the disk reads as.
  MemImage content() const {
    MemImage disk;
    disk.resize(1_MiB);
    std::vector<std::byte> bytes(kCluster);
    for (const uint64_t guest : {0, 1, 3}) {
      image.read(kData + (guest == 3 ? 2 : guest) * kCluster, bytes);
      disk.write(guest * kCluster, bytes);
    }
    return disk;
  }

  MemImage image;
};

}  // namespace imgfuse::test
