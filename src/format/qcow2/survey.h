// A count of every reference that an image's structures make to its host clusters (section 24).
#pragma once

#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

#include "core/findings.h"
#include "format/qcow2/header.h"
#include "format/qcow2/reference_counts.h"
#include "format/qcow2/snapshot_table.h"
#include "imgfuse/storage.h"

namespace imgfuse::qcow2 {

/// What the image refers to. Filled by take_survey().
///
/// Cost on hostile images: tables are visited once, however often they are referenced, and holes are skipped, so the
/// time is bounded by the size of the file; memory is bounded by the budget.
struct Survey {
  static constexpr uint64_t kMemory = uint64_t{160} << 20;

  MemoryBudget budget{kMemory};
  ReferenceCounts references{budget};     ///< of any kind
  ReferenceCounts l2_tables{budget};      ///< L1 entries, active and of snapshots, that point at this L2 table
  ReferenceCounts active_tables{budget};  ///< the active ones among them
  ReferenceCounts metadata{budget};       ///< not zero: holds metadata other than an L2 table
  ReferenceCounts bitmaps{budget};        ///< not zero: holds a part of a bitmap
  ReferenceCounts copied{budget};         ///< active entries that point here with the COPIED flag,
  ReferenceCounts not_copied{budget};     ///< and without; entries without references (zero, compressed) apart
  ReferenceCounts unexplained{budget};    ///< among the references: those that a repair takes on trust
  /// Where the data lies in another file: the active L1 entry that points at a table, by the table's cluster.
  std::unordered_map<uint64_t, uint64_t> l1_index;
  static constexpr uint64_t kPlaceMemory = 64;  // of one entry there
  uint64_t file_clusters = 0;                   ///< clusters of the file, the last one perhaps in part
  uint64_t file_size = 0;
  std::vector<uint64_t> refcount_table;  ///< its entries
  uint64_t mendable_entries = 0;         ///< L2 entries that a repair can put right by themselves
  bool bad_bitmaps = false;              ///< the bitmap directory, or something it leads to, is damaged
  bool must_rebuild = false;             ///< the refcount structures are damaged beyond repair in place
  bool lost_references = false;          ///< some entries could not be followed: what they meant is among the leaks

  /// An error if the counts are not complete.
  Result<> check_budget() const;
  /// More than what may share this cluster: metadata has one owner, an L2 table as many as there are L1 entries.
  bool metadata_overlaps(uint64_t cluster) const;
  /// The guest range that the L2 table in cluster `table` maps, if there is one and it is known.
  std::optional<GuestOffset> mapped_by(const Header& header, uint64_t table) const;
  /// Where the block for the index-th stretch of clusters lies; 0 where there is no usable one.
  HostOffset refcount_block(const Header& header, uint64_t index) const;
};

enum class RefcountStructures { counted, ignored };

/// Counts into `survey`, which is empty. Findings are the entries that are wrong by themselves.
Result<> take_survey(Storage& storage, const Header& header, const SnapshotTable& snapshots,
                     RefcountStructures refcount_structures, Findings& findings, Survey& survey);

}  // namespace imgfuse::qcow2
