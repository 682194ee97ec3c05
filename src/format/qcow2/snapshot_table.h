// The table of internal snapshots (section 19.1) as checked, native values.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "format/qcow2/header.h"
#include "imgfuse/check.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"
#include "imgfuse/units.h"

namespace imgfuse::qcow2 {

inline constexpr uint64_t kMaxSnapshotTableBytes = uint64_t{64} << 20;
inline constexpr uint32_t kMaxSnapshotExtra = 1024;

/// One snapshot.
struct Snapshot {
  HostOffset l1_offset;  ///< not checked: whoever uses the table asks check_snapshot_l1() first
  uint32_t l1_entries = 0;
  SnapshotInfo info;
  std::vector<std::byte> extra;  ///< as stored; sizes and instruction count in `info` come from its front

  /// Version 3 wants the virtual size in every entry.
  bool lacks_extra_data() const { return extra.size() < 16; }
  HostRange l1() const { return {l1_offset, uint64_t{l1_entries} * 8}; }
};

struct SnapshotTable {
  std::vector<Snapshot> snapshots;
  uint64_t length = 0;  ///< bytes from Header::snapshots_offset on
};

/// Reads the whole table. Refuses one that breaks a limit. Memory: in proportion to the table, at most about 100 MiB.
Result<SnapshotTable> read_snapshot_table(Storage& storage, const Header& header);

/// Which snapshot is meant: the one with that id, else the one with that name. Refuses what means none or several.
Result<size_t> find_snapshot(const std::vector<Snapshot>& snapshots, const std::string& id_or_name);

/// Extra data of a new snapshot.
std::vector<std::byte> encode_snapshot_extra(const SnapshotInfo& info);

/// The table's bytes, with the extra data that version 3 wants.
std::vector<std::byte> encode_snapshot_table(const SnapshotTable& table);

/// Whether the snapshot's L1 table can be used: aligned, not too large.
Result<> check_snapshot_l1(const Header& header, const Snapshot& snapshot);

}  // namespace imgfuse::qcow2
