// The raw format: guest bytes are host bytes. The driver's doors.
#pragma once

#include <memory>

#include "imgfuse/check.h"
#include "imgfuse/create.h"
#include "imgfuse/disk.h"
#include "imgfuse/storage.h"

namespace imgfuse::raw {

struct OpenParameters {
  bool read_only = false;
  /// The format was guessed, not given: a write that would make the first sector look like another format is refused.
  bool probed = false;
};

/// The disk is exactly as long as the storage, also where that is no multiple of 512.
Result<std::unique_ptr<Disk>> open(std::shared_ptr<Storage> storage, OpenParameters parameters);

/// Checks the options before any file exists: what only qcow2 can do is refused.
Result<> check_create_options(const CreateOptions& options);
/// Gives an empty storage its size and, as preallocation asks, its space.
Result<> create(Storage& storage, const CreateOptions& options);
/// Preallocates what is added.
Result<> resize(Storage& storage, uint64_t old_size, uint64_t size, Preallocation preallocation);

/// `filename` and `actual_size` are the caller's.
Result<ImageInfo> info(Storage& storage);

}  // namespace imgfuse::raw
