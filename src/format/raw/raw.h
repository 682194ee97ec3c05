// The raw format: guest bytes are host bytes.
#pragma once

#include <memory>

#include "imgfuse/create.h"
#include "imgfuse/disk.h"
#include "imgfuse/storage.h"

namespace imgfuse::raw {

struct OpenParameters {
  bool read_only = false;
  /// The format was guessed, not given: a write that would make the first sector look like another format is refused.
  bool probed = false;
};

Result<std::unique_ptr<Disk>> open(std::shared_ptr<Storage> storage, OpenParameters parameters);
Result<> create(Storage& storage, const CreateOptions& options);

}  // namespace imgfuse::raw
