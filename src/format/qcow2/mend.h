// Entries of L1 and L2 tables, put right one by one.
#pragma once

#include "format/qcow2/examination.h"
#include "format/qcow2/header.h"
#include "imgfuse/check.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"

namespace imgfuse::qcow2 {

/// Sets the COPIED flags of the active tables as the counted references want them. With Repair::all also puts right
/// what EntryRules can, and L1 entries: reserved bits go; an offset between two clusters loses the bits that brought it
/// there, if the cluster before it is in use and nothing else refers to it; one past the end of the file goes.
/// Bitmaps of which a part is damaged are declared invalid, all of them. Durable when it returns.
Result<> mend(Storage& storage, const Header& header, Repair mode, Examination& found);

}  // namespace imgfuse::qcow2
