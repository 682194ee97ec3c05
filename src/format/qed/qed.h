// The QED driver's doors: open, create, check, info. Nothing else of it is seen from outside.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "base/clock.h"
#include "core/backing.h"
#include "imgfuse/amend.h"
#include "imgfuse/check.h"
#include "imgfuse/create.h"
#include "imgfuse/disk.h"
#include "imgfuse/storage.h"

namespace imgfuse::qed {

struct OpenParameters {
  bool read_only = false;
  uint64_t metadata_cache = uint64_t{32} << 20;  ///< bytes
  BackingOpener open_backing;                    ///< called at most once, if a backing file is named; may give null
  Clock* clock = &Clock::steady();               ///< tells when the image has been idle; outlives the disk
};

/// Opens the image in `storage`. Opening for writing repairs an image that says that it needs a check, and clears
/// unknown autoclear bits.
Result<std::unique_ptr<Disk>> open(std::shared_ptr<Storage> storage, OpenParameters parameters);

/// Writes a new image into an empty storage.
Result<> create(Storage& storage, const CreateOptions& options);
/// Checks the options before any file exists, and refuses geometries that QEMU could not open.
Result<> check_create_options(const CreateOptions& options);

/// Follows every pointer (FORMAT.md, "Check and repair"). Repairs if asked to; the storage must then be writable.
Result<CheckReport> check(Storage& storage, Repair repair, const CheckSink& sink);

/// What the header says. `filename`, `actual_size` and `full_backing_filename` are the caller's.
Result<ImageInfo> info(Storage& storage);

/// Changes what imgfuse/amend.h says, as far as QED can express it. The storage is this image's alone.
Result<> amend(std::shared_ptr<Storage> storage, const AmendOptions& options, BackingOpener open_backing);
/// Records another backing file, or none if `name` is empty (imgfuse/amend.h).
Result<> change_backing(Storage& storage, const std::string& name, const std::optional<std::string>& format);

}  // namespace imgfuse::qed
