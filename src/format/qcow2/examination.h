// The outcome of one look at a whole image.
#pragma once

#include <cstdint>
#include <memory>

#include "format/qcow2/snapshot_table.h"
#include "format/qcow2/survey.h"
#include "imgfuse/check.h"

namespace imgfuse::qcow2 {

struct Examination {
  CheckReport report;
  SnapshotTable snapshots;
  std::unique_ptr<Survey> survey = std::make_unique<Survey>();
  uint64_t wrong_flags = 0;           ///< COPIED flags that differ from the stored counts; in report.corruptions too
  bool keep_entries = false;          ///< a repair leaves all but the flags of table entries as they are
  bool incomplete_snapshots = false;  ///< snapshot entries lack extra data
};

}  // namespace imgfuse::qcow2
