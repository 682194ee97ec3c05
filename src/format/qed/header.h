// The QED header as checked, native values. Only header.cc looks at the bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "imgfuse/error.h"
#include "imgfuse/storage.h"
#include "imgfuse/units.h"

namespace imgfuse::qed {

inline constexpr uint64_t kBackingFile = 1 << 0;
inline constexpr uint64_t kNeedCheck = 1 << 1;
inline constexpr uint64_t kBackingIsRaw = 1 << 2;  // BACKING_FORMAT_NO_PROBE

inline constexpr uint32_t kMinClusterSize = 4096;
inline constexpr uint32_t kMaxClusterSize = 64 << 20;
inline constexpr uint32_t kMaxTableSize = 16;
inline constexpr size_t kMaxBackingName = 4095;
inline constexpr uint64_t kHeaderBytes = 64;
/// Host files are not longer, and nor are disks.
inline constexpr uint64_t kMaxFileBytes = (uint64_t{1} << 63) - 512;

/// The 64 bytes at the front of the file, and the name they point at.
struct Header {
  uint32_t cluster_size = 65536;
  uint32_t table_size = 4;   ///< clusters
  uint32_t header_size = 1;  ///< clusters
  uint64_t features = 0;
  uint64_t compat_features = 0;
  uint64_t autoclear_features = 0;
  HostOffset l1_offset;
  uint64_t image_size = 0;           ///< bytes, a multiple of 512
  uint32_t backing_name_offset = 0;  ///< as stored, also where there is no backing file
  uint32_t backing_name_length = 0;
  std::optional<std::string> backing_name;

  uint64_t table_bytes() const { return uint64_t{cluster_size} * table_size; }
  /// Entries of the L1 table, and of each L2 table.
  uint64_t table_entries() const { return table_bytes() / 8; }
  /// Guest bytes that one L2 table maps.
  uint64_t coverage() const { return table_entries() * cluster_size; }
  /// L1 entries that the disk's size needs.
  uint64_t l1_entries() const { return image_size / coverage() + (image_size % coverage() != 0); }
  /// Nothing but the header lies before it.
  HostOffset first_cluster() const { return HostOffset(uint64_t{std::max(header_size, 1u)} * cluster_size); }
  std::optional<std::string> backing_format() const {
    return features & kBackingIsRaw ? std::optional<std::string>("raw") : std::nullopt;
  }
};

/// Largest disk of this geometry, in bytes.
uint64_t max_image_size(uint32_t cluster_size, uint32_t table_size);

/// Where the file ends for QED: a last cluster that is not whole does not exist.
Result<HostOffset> end_of_file(Storage& storage, uint32_t cluster_size);

/// Whether `length` bytes at `offset`, whole clusters, may be a table or a data cluster of a file that ends at `end`.
bool is_place(const Header& header, HostOffset offset, uint64_t length, HostOffset end);

/// Reads and checks the header. Refuses unknown features.
Result<Header> read_header(Storage& storage);

/// Writes the known 64 bytes, and `behind` with them; what lies behind that stays. Not durable yet.
Result<> write_header(Storage& storage, const Header& header, ConstBytes behind = {});

/// Durably, before a writer changes anything else: imgfuse keeps none of them up.
Result<> clear_autoclear_features(Storage& storage, Header& header);

}  // namespace imgfuse::qed
