// Going through tables of big-endian entries, and through many tables that may overlap.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/endian.h"
#include "core/table_scan.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"
#include "imgfuse/units.h"

namespace imgfuse::qcow2 {

using Entries = std::span<be<uint64_t>>;

/// Shows the entries of the table `range` (a multiple of 8 bytes) to `visit`, piece by piece, with the index of the
/// piece's first entry. Holes in the file are skipped: their entries are zero. An error from `visit` ends the scan.
Result<> scan_table(Storage& storage, HostRange range, const std::function<Result<>(uint64_t first, Entries)>& visit);

/// The same, and writes a piece back when `visit` says that it changed it.
Result<> edit_table(Storage& storage, HostRange range,
                    const std::function<Result<bool>(uint64_t first, Entries)>& visit);

/// The same, but shows holes as well, so that they may be filled.
Result<> edit_whole_table(Storage& storage, HostRange range,
                          const std::function<Result<bool>(uint64_t first, Entries)>& visit);

/// A part of one or more tables.
struct Stretch {
  HostRange range;
  uint64_t times = 0;  ///< how many tables hold it
};

/// Tables laid over each other: disjoint stretches, ascending. However often tables overlap, each byte of the file is
/// in one stretch at most, so that a visit of all stretches takes no longer than a visit of the file.
std::vector<Stretch> overlay(const std::vector<HostRange>& tables);

}  // namespace imgfuse::qcow2
