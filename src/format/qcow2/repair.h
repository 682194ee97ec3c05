// Putting right what an examination found.
#pragma once

#include "format/qcow2/examination.h"
#include "format/qcow2/header.h"
#include "imgfuse/check.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"

namespace imgfuse::qcow2 {

/// Repairs what `mode` allows, in an order that a crash cannot make worse: counts are raised before anything relies on
/// them, and lowered last. Uses up the survey in `found`. The image must be examined again afterwards.
Result<> repair(Storage& storage, const Header& header, Repair mode, Examination& found);

}  // namespace imgfuse::qcow2
