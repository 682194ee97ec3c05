// qcow2 structures as they lie on disk (FORMAT.md, "Layout"). Only header.cc, snapshots and l2_entry.h look at these.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/endian.h"

namespace imgfuse::qcow2::wire {

inline constexpr uint32_t kMagic = 0x514649fb;  // "QFI\xfb"

struct Header {
  be<uint32_t> magic;
  be<uint32_t> version;
  be<uint64_t> backing_name_offset;  // 0: no backing file
  be<uint32_t> backing_name_length;
  be<uint32_t> cluster_bits;
  be<uint64_t> size;
  be<uint32_t> crypt_method;
  be<uint32_t> l1_entries;
  be<uint64_t> l1_offset;
  be<uint64_t> refcount_table_offset;
  be<uint32_t> refcount_table_clusters;
  be<uint32_t> snapshot_count;
  be<uint64_t> snapshots_offset;
  // Version 3 from here on.
  be<uint64_t> incompatible;
  be<uint64_t> compatible;
  be<uint64_t> autoclear;
  be<uint32_t> refcount_order;
  be<uint32_t> header_length;
  // Only where header_length says so.
  be<uint8_t> compression_type;
  be<uint8_t> padding[7];
};
static_assert(sizeof(Header) == 112 && alignof(Header) == 1);
static_assert(offsetof(Header, incompatible) == 72);
static_assert(offsetof(Header, compression_type) == 104);

inline constexpr uint32_t kHeaderLengthV2 = 72;
inline constexpr uint32_t kHeaderLengthV3 = 104;

struct ExtensionHeader {
  be<uint32_t> type;
  be<uint32_t> length;
};
static_assert(sizeof(ExtensionHeader) == 8);

inline constexpr uint32_t kExtensionEnd = 0;
inline constexpr uint32_t kExtensionBackingFormat = 0xe2792aca;
inline constexpr uint32_t kExtensionFeatureNames = 0x6803f857;
inline constexpr uint32_t kExtensionBitmaps = 0x23852875;
inline constexpr uint32_t kExtensionEncryption = 0x0537be77;
inline constexpr uint32_t kExtensionDataFile = 0x44415441;
inline constexpr uint32_t kExtensionCountsAhead = 0x49464341;  // "IFCA", imgfuse's own: Header::counts_ahead
inline constexpr uint32_t kExtensionPadding = 0x49465044;  // "IFPD", imgfuse's own: hides a stretch (header_update.h)

struct FeatureName {
  be<uint8_t> kind;  // 0 incompatible, 1 compatible, 2 autoclear
  be<uint8_t> bit;
  char name[46];
};
static_assert(sizeof(FeatureName) == 48);

struct SnapshotHeader {
  be<uint64_t> l1_offset;
  be<uint32_t> l1_entries;
  be<uint16_t> id_length;
  be<uint16_t> name_length;
  be<uint32_t> date_sec;
  be<uint32_t> date_nsec;
  be<uint64_t> vm_clock_nsec;
  be<uint32_t> vm_state_size;
  be<uint32_t> extra_size;
};
static_assert(sizeof(SnapshotHeader) == 40);

struct SnapshotExtra {
  be<uint64_t> vm_state_size;
  be<uint64_t> disk_size;
  be<uint64_t> icount;  // all ones: none
};
static_assert(sizeof(SnapshotExtra) == 24);

struct BitmapsExtension {
  be<uint32_t> count;
  be<uint32_t> reserved;
  be<uint64_t> directory_bytes;
  be<uint64_t> directory_offset;
};
static_assert(sizeof(BitmapsExtension) == 24);

struct BitmapHeader {
  be<uint64_t> table_offset;
  be<uint32_t> table_entries;
  be<uint32_t> flags;
  be<uint8_t> type;
  be<uint8_t> granularity_bits;
  be<uint16_t> name_length;
  be<uint32_t> extra_size;
};
static_assert(sizeof(BitmapHeader) == 24);

struct EncryptionExtension {
  be<uint64_t> offset;
  be<uint64_t> length;
};
static_assert(sizeof(EncryptionExtension) == 16);

}  // namespace imgfuse::qcow2::wire
