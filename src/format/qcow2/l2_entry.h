// Table entries: the bits of L1 entries, standard L2 entries, compressed descriptors and refcount table entries.
#pragma once

#include <cstdint>

#include "imgfuse/units.h"

namespace imgfuse::qcow2 {

inline constexpr uint64_t kOffsetMask = 0x00fffffffffffe00;  // L1 and standard L2 entries
inline constexpr uint64_t kCopied = uint64_t{1} << 63;       // refcount is exactly one
inline constexpr uint64_t kCompressed = uint64_t{1} << 62;
inline constexpr uint64_t kZeroFlag = 1;
inline constexpr uint64_t kL1Reserved = 0x7f000000000001ff;
inline constexpr uint64_t kL2Reserved = 0x3f000000000001fe;
inline constexpr uint64_t kRefcountTableMask = 0xfffffffffffffe00;
inline constexpr uint64_t kRefcountTableReserved = 0x1ff;
/// Host offsets of tables and data stay below this.
inline constexpr uint64_t kMaxHostOffset = uint64_t{1} << 56;

/// What a standard L2 entry says of its guest cluster.
enum class ClusterKind { unallocated, zero_plain, zero_allocated, normal, compressed };

/// Where a compressed cluster's bytes lie: from `offset` on, at most `length` bytes (section 8).
struct CompressedRange {
  HostOffset offset;
  uint64_t length = 0;
};

/// One L1 entry.
struct L1Entry {
  uint64_t raw = 0;
  constexpr HostOffset table() const { return HostOffset(raw & kOffsetMask); }
  constexpr bool present() const { return (raw & kOffsetMask) != 0; }
  constexpr bool copied() const { return (raw & kCopied) != 0; }
  static constexpr L1Entry of(HostOffset table) { return {table.bytes() | kCopied}; }
  constexpr bool operator==(const L1Entry&) const = default;
};

/// One standard (8 byte) L2 entry.
struct L2Entry {
  uint64_t raw = 0;

  constexpr ClusterKind kind() const {
    if (raw & kCompressed) return ClusterKind::compressed;  // first: in a descriptor every other bit is address
    const bool has_host = (raw & kOffsetMask) != 0;
    if (raw & kZeroFlag) return has_host ? ClusterKind::zero_allocated : ClusterKind::zero_plain;
    return has_host ? ClusterKind::normal : ClusterKind::unallocated;
  }
  constexpr bool copied() const { return (raw & kCopied) != 0; }
  /// Host cluster of a normal or zero-allocated entry.
  constexpr HostOffset host() const { return HostOffset(raw & kOffsetMask); }
  /// The entry owns references on host clusters.
  constexpr bool holds_host() const {
    const ClusterKind k = kind();
    return k == ClusterKind::normal || k == ClusterKind::zero_allocated || k == ClusterKind::compressed;
  }
  constexpr CompressedRange compressed_range(uint32_t cluster_bits) const {
    const unsigned offset_bits = 70 - cluster_bits;
    const uint64_t offset = raw & ((uint64_t{1} << offset_bits) - 1) & (kMaxHostOffset - 1);
    const uint64_t extra_sectors = (raw & ~(kCompressed | kCopied)) >> offset_bits;
    return {HostOffset(offset), (extra_sectors + 1) * 512 - (offset & 511)};
  }
  static constexpr L2Entry normal(HostOffset host) { return {host.bytes() | kCopied}; }
  static constexpr L2Entry zero_plain() { return {kZeroFlag}; }
  constexpr bool operator==(const L2Entry&) const = default;
};

}  // namespace imgfuse::qcow2
