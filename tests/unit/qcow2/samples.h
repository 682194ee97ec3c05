// Small images with known places, to be damaged.
#pragma once

#include <cstdint>

#include "bytes.h"
#include "support/mem_storage.h"

namespace imgfuse::test {

/// 1 MiB of disk in clusters of 64 KiB; three data clusters, for guest clusters 0, 1 and 3:
///
///   host cluster   0        1               2                3    4    5     6     7
///                  header   refcount table  refcount block   L1   L2   data  data  data
struct Sample {
  static constexpr uint64_t kCluster = 65536;
  static constexpr uint64_t kRefcountTable = 0x10000;
  static constexpr uint64_t kRefcountBlock = 0x20000;
  static constexpr uint64_t kL1 = 0x30000;
  static constexpr uint64_t kL2 = 0x40000;
  static constexpr uint64_t kData = 0x50000;
  static constexpr uint64_t kEnd = 0x80000;

  MemImage image;

  Sample();
  uint64_t l1() const { return peek<uint64_t>(image, kL1); }
  void set_l1(uint64_t entry) { poke(image, kL1, entry); }
  uint64_t l2(uint64_t index) const { return peek<uint64_t>(image, kL2 + index * 8); }
  void set_l2(uint64_t index, uint64_t entry) { poke(image, kL2 + index * 8, entry); }
  uint16_t count(uint64_t cluster) const { return peek<uint16_t>(image, kRefcountBlock + cluster * 2); }
  void set_count(uint64_t cluster, uint16_t count) { poke(image, kRefcountBlock + cluster * 2, count); }
};

/// A sample with two snapshots, made by QEMU, and its first data cluster written again since.
struct SnapshotSample {
  MemImage image;

  SnapshotSample();
  uint64_t table() const { return peek<uint64_t>(image, 64); }
  uint64_t l1() const { return peek<uint64_t>(image, table()); }
  uint64_t l2() const { return peek<uint64_t>(image, l1()) & kAddressBits; }
};

}  // namespace imgfuse::test
