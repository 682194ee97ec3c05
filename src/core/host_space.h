// Host space of a storage: taken ahead of need, and given back.
#pragma once

#include "imgfuse/disk.h"
#include "imgfuse/storage.h"

namespace imgfuse {

/// Takes host space for a range that reads as zeros: `falloc` reserves it, `full` writes every byte, the others do
/// nothing. Blocks.
Result<> preallocate(Storage& storage, HostRange range, Preallocation mode);

/// The range reads as zeros afterwards, and keeps no host space where that can be given back. Punches a hole, and
/// writes zeros where the host still has data: where it could not punch, and on block devices. Blocks.
Result<> zero_and_free(Storage& storage, HostRange range);

}  // namespace imgfuse
