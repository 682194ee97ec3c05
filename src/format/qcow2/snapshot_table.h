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

/// One snapshot. Its L1 table is not checked: whoever uses it does that (19.3).
struct Snapshot {
  HostOffset l1_offset;
  uint32_t l1_entries = 0;
  uint32_t extra_size = 0;  ///< as stored; the known fields come from its front
  SnapshotInfo info;
};

struct SnapshotTable {
  std::vector<Snapshot> snapshots;
  uint64_t length = 0;  ///< bytes from HostOffset Header::snapshots_offset on
};

/// Reads the whole table. Refuses one that breaks a limit. Memory: in proportion to the table, at most 64 MiB.
Result<SnapshotTable> read_snapshot_table(Storage& storage, const Header& header);

}  // namespace imgfuse::qcow2
