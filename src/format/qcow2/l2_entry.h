// Table entries: the bits of L1 entries, L2 entries (standard and extended), compressed descriptors and refcount table
// entries.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/endian.h"
#include "imgfuse/storage.h"
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

/// What an L2 entry says of its guest cluster or, in an extended one, of one of its subclusters.
enum class ClusterKind {
  unallocated,
  zero_plain,
  zero_allocated,
  normal,
  compressed,
  reserved,  ///< host space is kept for it, but it reads as if it were unallocated (extended only)
};

/// Where a compressed cluster's bytes lie: from `offset` on, at most `length` bytes (section 8).
struct CompressedRange {
  HostOffset offset;
  uint64_t length = 0;
};

/// The bytes of compressed clusters lie below this.
constexpr uint64_t compressed_limit(uint32_t cluster_bits) {
  return cluster_bits > 14 ? uint64_t{1} << (70 - cluster_bits) : kMaxHostOffset;
}

/// One L1 entry.
struct L1Entry {
  uint64_t raw = 0;
  constexpr HostOffset table() const { return HostOffset(raw & kOffsetMask); }
  constexpr bool present() const { return (raw & kOffsetMask) != 0; }
  constexpr bool copied() const { return (raw & kCopied) != 0; }
  static constexpr L1Entry of(HostOffset table) { return {table.bytes() | kCopied}; }
  constexpr bool operator==(const L1Entry&) const = default;
};

/// One L2 entry: 8 bytes, or 16 with extended entries. Bits 0 to 31 of the second word say which subclusters have their
/// bytes on the host, bits 32 to 63 which of them read as zeros.
struct L2Entry {
  uint64_t raw = 0;
  uint64_t bitmap = 0;  ///< the second word; 0 in a standard entry

  constexpr bool copied() const { return (raw & kCopied) != 0; }
  /// Host cluster of a normal or zero-allocated entry.
  constexpr HostOffset host() const { return HostOffset(raw & kOffsetMask); }
  constexpr CompressedRange compressed_range(uint32_t cluster_bits) const {
    const unsigned offset_bits = 70 - cluster_bits;
    const uint64_t offset = raw & ((uint64_t{1} << offset_bits) - 1) & (kMaxHostOffset - 1);
    const uint64_t extra_sectors = (raw & ~(kCompressed | kCopied)) >> offset_bits;
    return {HostOffset(offset), (extra_sectors + 1) * 512 - (offset & 511)};
  }
  /// `range` lies below compressed_limit(). Its length is rounded up to where its last sector ends.
  static constexpr L2Entry compressed(CompressedRange range, uint32_t cluster_bits) {
    const uint64_t begin = range.offset.bytes();
    const uint64_t extra_sectors = (begin + range.length - 1) / 512 - begin / 512;
    return {kCompressed | extra_sectors << (70 - cluster_bits) | begin, 0};
  }
  constexpr bool operator==(const L2Entry&) const = default;
};

/// How the L2 entries of an image are to be read: what its header says of them.
struct L2Format {
  bool extended = false;   ///< 16 bytes, 32 subclusters
  bool data_file = false;  ///< guest data lies in another file, where offset 0 is a place

  static constexpr uint64_t kAllSubclusters = 0xffffffff;

  constexpr uint64_t entry_bytes() const { return extended ? 16 : 8; }
  /// Units of a cluster that have a kind of their own.
  constexpr uint32_t subclusters() const { return extended ? 32 : 1; }

  /// The entry names a host cluster that holds, or is kept for, plain bytes.
  constexpr bool has_host(L2Entry entry) const {
    if (entry.raw & kCompressed) return false;
    if (entry.raw & kOffsetMask) return true;
    // The first cluster of a data file; a zero flag there keeps nothing.
    return data_file && (entry.raw & kCopied) && (extended || !(entry.raw & kZeroFlag));
  }
  constexpr bool is_compressed(L2Entry entry) const { return (entry.raw & kCompressed) != 0; }
  /// The entry owns host space of any kind.
  constexpr bool holds_host(L2Entry entry) const { return is_compressed(entry) || has_host(entry); }

  /// Of an entry that valid() accepts.
  constexpr ClusterKind kind(L2Entry entry, uint32_t subcluster = 0) const {
    if (is_compressed(entry)) return ClusterKind::compressed;  // first: in a descriptor every other bit is address
    const bool host = has_host(entry);
    const bool zero = extended ? (entry.bitmap >> (32 + subcluster) & 1) : (entry.raw & kZeroFlag);
    if (zero) return host ? ClusterKind::zero_allocated : ClusterKind::zero_plain;
    if (!host) return ClusterKind::unallocated;
    return !extended || (entry.bitmap >> subcluster & 1) ? ClusterKind::normal : ClusterKind::reserved;
  }
  /// No subcluster is both allocated and zero, none is allocated without a host cluster, and a compressed cluster has
  /// no subclusters.
  constexpr bool valid(L2Entry entry) const {
    if (!extended) return true;
    if (is_compressed(entry)) return entry.bitmap == 0;
    return (entry.bitmap & entry.bitmap >> 32 & kAllSubclusters) == 0 &&
           (has_host(entry) || (entry.bitmap & kAllSubclusters) == 0);
  }

  /// All bytes of the cluster are on the host, at `host`, for this entry alone.
  constexpr L2Entry normal(HostOffset host) const { return {host.bytes() | kCopied, extended ? kAllSubclusters : 0}; }
  constexpr L2Entry zero_plain() const { return extended ? L2Entry{0, kAllSubclusters << 32} : L2Entry{kZeroFlag, 0}; }
  /// Reads as zeros, and keeps `host` for later.
  constexpr L2Entry zero_allocated(HostOffset host) const {
    return {host.bytes() | kCopied | zero_plain().raw, zero_plain().bitmap};
  }

  /// Entry `index` of a table, or of a stretch of one.
  L2Entry load(ConstBytes table, uint64_t index) const {
    be<uint64_t> words[2];
    std::memcpy(words, &table[index * entry_bytes()], entry_bytes());
    return {words[0], extended ? uint64_t{words[1]} : 0};
  }
  void store(Bytes table, uint64_t index, L2Entry entry) const {
    const be<uint64_t> words[2] = {be<uint64_t>(entry.raw), be<uint64_t>(entry.bitmap)};
    std::memcpy(&table[index * entry_bytes()], words, entry_bytes());
  }
};

}  // namespace imgfuse::qcow2
