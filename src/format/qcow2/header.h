// The qcow2 header as checked, native values. Only header.cc looks at the bytes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "format/qcow2/l2_entry.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"
#include "imgfuse/units.h"

namespace imgfuse::qcow2 {

/// Feature bits (formats: qcow2 specification, section 4).
inline constexpr uint64_t kDirty = 1 << 0;
inline constexpr uint64_t kCorrupt = 1 << 1;
inline constexpr uint64_t kDataFile = 1 << 2;
inline constexpr uint64_t kCompressionType = 1 << 3;
inline constexpr uint64_t kExtendedL2 = 1 << 4;
inline constexpr uint64_t kLazyRefcounts = 1 << 0;  // compatible
inline constexpr uint64_t kBitmaps = 1 << 0;        // autoclear
inline constexpr uint64_t kRawDataFile = 1 << 1;    // autoclear

enum class Compression : uint8_t { deflate = 0, zstd = 1 };

/// A header extension kept as it was found: written back byte for byte on every rewrite.
struct Extension {
  uint32_t type = 0;
  std::vector<std::byte> data;
};

/// Everything that the first cluster says, checked against the limits of section 25.
struct Header {
  uint32_t version = 3;
  uint32_t cluster_bits = 16;
  uint64_t size = 0;  ///< virtual size in bytes, a multiple of 512
  uint32_t crypt_method = 0;
  uint32_t l1_entries = 0;
  HostOffset l1_offset;
  HostOffset refcount_table_offset;
  uint32_t refcount_table_clusters = 0;
  uint32_t snapshot_count = 0;
  HostOffset snapshots_offset;
  uint64_t incompatible = 0;  ///< v2: 0
  uint64_t compatible = 0;    ///< v2: 0
  uint64_t autoclear = 0;     ///< v2: 0
  uint32_t refcount_order = 4;
  Compression compression = Compression::deflate;
  std::vector<std::byte> unknown_tail;  ///< header bytes past the ones known here (112…header_length)
  uint32_t header_length = 112;         ///< v2: 72
  std::optional<std::string> backing_name;
  std::optional<std::string> backing_format;
  std::optional<std::string> data_file;  ///< name of the external data file; may be missing where one is needed
  bool counts_ahead = false;             ///< clusters that nothing points at may be counted (FORMAT.md, "Counts ahead")
  std::vector<Extension> extensions;     ///< all but those three and the end marker, in file order

  uint64_t cluster_size() const { return uint64_t{1} << cluster_bits; }
  L2Format l2_format() const { return {(incompatible & kExtendedL2) != 0, has_data_file()}; }
  bool has_data_file() const { return (incompatible & kDataFile) != 0; }
  /// The data file alone reads as the disk does. What a backing file shows is not in it, whatever the header says.
  bool has_raw_data_file() const { return has_data_file() && (autoclear & kRawDataFile) != 0 && !backing_name; }
  /// Entries per L2 table.
  uint64_t l2_entries() const { return cluster_size() / l2_format().entry_bytes(); }
  /// Guest bytes that one L2 table maps.
  uint64_t l2_coverage() const { return cluster_size() * l2_entries(); }
  /// Reference counts per refcount block.
  uint64_t refcounts_per_block() const { return cluster_size() * 8 >> refcount_order; }
  uint64_t max_refcount() const { return ~uint64_t{0} >> (64 - (uint64_t{1} << refcount_order)); }
};

/// Positions of fields that are changed in place (section 2).
inline constexpr HostOffset kSizeField{24};           // size 8, crypt 4, L1 entries 4, L1 offset 8: up to byte 48
inline constexpr HostOffset kRefcountTableField{48};  // offset 8, clusters 4
inline constexpr HostOffset kIncompatibleField{72};   // v3 only: incompatible 8, compatible 8, autoclear 8
inline constexpr HostOffset kAutoclearField{88};

/// Limits on what an image may ask for (section 25).
inline constexpr uint64_t kMaxL1Entries = uint64_t{4} << 20;
inline constexpr uint64_t kMaxRefcountTableBytes = uint64_t{8} << 20;
inline constexpr uint32_t kMaxSnapshots = 65536;
inline constexpr size_t kMaxBackingName = 1023;
inline constexpr size_t kMaxBackingFormat = 15;
inline constexpr size_t kMaxDataFileName = 4095;  // a host's longest path

/// What the image is wanted for: some images open for reading or repair only.
enum class Purpose { info, read, write, repair };

/// Reads and checks the header (section 5). Refuses, by name, what imgfuse cannot open for `purpose`: `info` only
/// refuses what cannot be parsed.
Result<Header> read_header(Storage& storage, Purpose purpose);

/// The bytes of the header area: header, extensions, end marker, backing name. At most one cluster long; an error and
/// nothing else when it does not fit.
Result<std::vector<std::byte>> encode_header(const Header& header);

/// Virtual size limit (the 32 MiB L1 limit, section 1).
uint64_t max_virtual_size(uint32_t cluster_bits, bool extended_l2 = false);

}  // namespace imgfuse::qcow2
