// New reference count structures for an image whose own cannot be trusted.
#pragma once

#include "format/qcow2/header.h"
#include "format/qcow2/reference_counts.h"
#include "format/qcow2/snapshot_table.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"

namespace imgfuse::qcow2 {

struct RebuildInput {
  const ReferenceCounts& references;             ///< of all clusters but for the old refcount structures
  uint64_t first_free = 0;                       ///< cluster: from here on nothing is in use, nor was before
  const SnapshotTable* new_snapshots = nullptr;  ///< also written anew, if given
};

/// Writes a refcount table and its blocks behind everything else, and switches to them with one header write. The old
/// structures are left alone, and are free space afterwards. Durable when it returns.
Result<> rebuild_refcounts(Storage& storage, const Header& header, const RebuildInput& input);

}  // namespace imgfuse::qcow2
