// The qcow2 driver's doors: open, create, check, info. Nothing else of it is seen from outside.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "core/backing.h"
#include "imgfuse/amend.h"
#include "imgfuse/check.h"
#include "imgfuse/create.h"
#include "imgfuse/disk.h"
#include "imgfuse/storage.h"

namespace imgfuse {
class ClusterCache;
}

namespace imgfuse::qcow2 {

struct OpenParameters {
  bool read_only = false;
  uint64_t metadata_cache = uint64_t{32} << 20;    ///< bytes
  std::shared_ptr<ClusterCache> compressed_cache;  ///< for what compressed clusters inflate to; may be null
  std::optional<std::string> snapshot;             ///< id or name: what is opened is this snapshot; read-only
  std::shared_ptr<const void> hold;                ///< let go of when the disk is closed
  std::optional<std::string> compress;             ///< as OpenOptions::compress
  BackingOpener open_backing;                      ///< called at most once, if a backing file is named; may give null
  DataFileOpener open_data_file;                   ///< called at most once, before that, if the image has one
};

bool probe(ConstBytes first_bytes);

/// Opens the image in `storage`. Opening for writing repairs a dirty image and clears unknown autoclear bits.
Result<std::unique_ptr<Disk>> open(std::shared_ptr<Storage> storage, OpenParameters parameters);

/// Writes a new image into an empty storage. The backing file's size is `options.size` unless given. A data file is the
/// caller's to make, with the size of the disk and all zeros.
Result<> create(Storage& storage, const CreateOptions& options);

/// Checks the options that only qcow2 knows about, before any file exists.
Result<> check_create_options(const CreateOptions& options);

/// Counts every reference (section 24) and compares. Repairs first if asked to; the storage must then be writable.
Result<CheckReport> check(Storage& storage, Repair repair, const CheckSink& sink);

/// Puts right the counts and COPIED flags of an image that was not closed cleanly. Damage of any other kind is left
/// alone, and an error.
Result<> recount(Storage& storage);

/// Frees what was counted ahead of need when the image was not closed cleanly. Damage of any kind is left alone, and an
/// error of kind `corrupt`.
Result<> free_counted_ahead(Storage& storage);

/// What the header and the snapshot table say. `filename`, `actual_size` and `full_backing_filename` are the caller's.
Result<ImageInfo> info(Storage& storage);

/// Changes what imgfuse/amend.h says. The storage is this image's alone.
Result<> amend(std::shared_ptr<Storage> storage, const AmendOptions& options, BackingOpener open_backing);

/// Records another backing file, or none if `name` is empty (imgfuse/amend.h).
Result<> change_backing(Storage& storage, const std::string& name, const std::optional<std::string>& format);

}  // namespace imgfuse::qcow2
