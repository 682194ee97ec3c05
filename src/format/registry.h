// The formats imgfuse knows, by name and by first bytes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "imgfuse/amend.h"
#include "imgfuse/check.h"
#include "imgfuse/create.h"
#include "imgfuse/disk.h"
#include "imgfuse/storage.h"

namespace imgfuse {

class ClusterCache;

/// Opens a file that an image names as its backing file, read-only. Called during open only.
using BackingOpener =
    std::function<Result<std::unique_ptr<Disk>>(const std::string& name, const std::optional<std::string>& format)>;

/// Opens the external data file of an image, for writing if the image is. Called during open only, before
/// BackingOpener.
using DataFileOpener = std::function<Result<std::shared_ptr<Storage>>(const std::optional<std::string>& name)>;

struct FormatOpenParameters {
  bool read_only = false;
  bool probed = false;                             ///< the format was guessed
  uint64_t metadata_cache = 0;                     ///< bytes
  std::shared_ptr<ClusterCache> compressed_cache;  ///< one for the whole chain; may be null
  std::optional<std::string> snapshot;             ///< open this internal snapshot; read-only
  std::optional<std::string> compress;             ///< OpenOptions::compress, for the top image
  BackingOpener open_backing;
  DataFileOpener open_data_file;
};

/// A driver's doors.
struct Format {
  std::string_view name;
  Result<std::unique_ptr<Disk>> (*open)(std::shared_ptr<Storage>, FormatOpenParameters);
  Result<> (*check_create_options)(const CreateOptions&);
  Result<> (*create)(Storage&, const CreateOptions&);
  Result<CheckReport> (*check)(Storage&, Repair, const CheckSink&);
  Result<ImageInfo> (*info)(Storage&);
  Result<> (*amend)(std::shared_ptr<Storage>, const AmendOptions&, BackingOpener);
  Result<> (*change_backing)(Storage&, const std::string& name, const std::optional<std::string>& format);
};

/// Fails with `unsupported` for names of formats that exist elsewhere, with `invalid` for others.
Result<const Format*> format_by_name(std::string_view name);

/// Looks at the first bytes: qcow2 or else raw. Fails with `unsupported` if they belong to a format that imgfuse does
/// not read, since presenting such a file as a raw disk invites to destroy it.
Result<const Format*> probe_format(Storage& storage);

}  // namespace imgfuse
