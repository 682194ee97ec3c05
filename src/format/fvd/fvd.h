// The FVD driver's doors: open, create, check, info. Nothing else of it is seen from outside.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "core/backing.h"
#include "imgfuse/amend.h"
#include "imgfuse/check.h"
#include "imgfuse/create.h"
#include "imgfuse/disk.h"
#include "imgfuse/storage.h"

namespace imgfuse::fvd {

struct OpenParameters {
  bool read_only = false;
  BackingOpener open_backing;     ///< called at most once, if the base is in use
  DataFileOpener open_data_file;  ///< called at most once, if the image names a data file
  /// Then called with that file: gives what it holds, or the file itself if it is raw. Null: it is raw.
  std::function<Result<std::shared_ptr<Storage>>(std::shared_ptr<Storage>, const std::optional<std::string>& format)>
      open_data_format;
  /// Runs the image's command that makes the device of its data longer by `bytes`. Null: such commands are not run.
  std::function<Result<>(const std::string& command, uint64_t bytes, const std::string& device)> grow_device;
  bool keeps_base = false;  ///< the image does not leave its base when it has everything
};

/// Opens the image in `storage`. What the journal holds is applied: on disk when opened for writing, else in memory.
Result<std::unique_ptr<Disk>> open(std::shared_ptr<Storage> storage, OpenParameters parameters);

/// Checks the options that only FVD knows about, before any file exists.
Result<> check_create_options(const CreateOptions& options);
/// Writes a new image into an empty storage. `backing` is the open base, if there is one.
Result<> create(Storage& storage, const CreateOptions& options, Disk* backing);

/// Compares table, bitmap and journal with each other and with the file. Repairs first if asked to; the storage must
/// then be writable. An image without a journal that was not closed cleanly is declared clean by Repair::all.
Result<CheckReport> check(Storage& storage, Repair repair, const CheckSink& sink);

/// What the header says. `filename`, `actual_size` and `full_backing_filename` are the caller's.
Result<ImageInfo> info(Storage& storage);

/// Changes the settings of imgfuse/amend.h. The storage is this image's alone.
Result<> amend(Storage& storage, const AmendOptions& options);
/// Records another base, or none if `name` is empty, which is possible when everything is in the image.
Result<> change_backing(Storage& storage, const std::string& name, const std::optional<std::string>& format);

}  // namespace imgfuse::fvd
