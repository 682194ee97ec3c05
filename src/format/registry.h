// The formats imgfuse knows, by name and by first bytes.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "core/backing.h"
#include "imgfuse/amend.h"
#include "imgfuse/check.h"
#include "imgfuse/create.h"
#include "imgfuse/disk.h"
#include "imgfuse/storage.h"

namespace imgfuse {

class ClusterCache;

struct FormatOpenParameters {
  bool read_only = false;
  bool probed = false;                             ///< the format was guessed
  uint64_t metadata_cache = 0;                     ///< bytes
  std::shared_ptr<ClusterCache> compressed_cache;  ///< one for the whole chain; may be null
  std::optional<std::string> snapshot;             ///< open this internal snapshot; read-only
  std::optional<std::string> compress;             ///< OpenOptions::compress, for the top image
  BackingOpener open_backing;
  DataFileOpener open_data_file;
  /// Presents a data file of another format as what it holds; for data files that are raw it is the file itself.
  std::function<Result<std::shared_ptr<Storage>>(std::shared_ptr<Storage>, const std::optional<std::string>& format)>
      open_data_format;
  /// Runs an image's own command that makes a device longer by `bytes`; null: no image's commands are run.
  std::function<Result<>(const std::string& command, uint64_t bytes, const std::string& device)> grow_device;
  bool keeps_backing = false;  ///< an image that has everything goes on naming its backing file
};

/// A driver's doors.
struct Format {
  std::string_view name;
  Result<std::unique_ptr<Disk>> (*open)(std::shared_ptr<Storage>, FormatOpenParameters);
  Result<> (*check_create_options)(const CreateOptions&);
  /// The backing disk is open where there is one.
  Result<> (*create)(Storage&, const CreateOptions&, Disk* backing);
  Result<CheckReport> (*check)(Storage&, Repair, const CheckSink&);
  Result<ImageInfo> (*info)(Storage&);
  Result<> (*amend)(std::shared_ptr<Storage>, const AmendOptions&, BackingOpener);
  Result<> (*change_backing)(Storage&, const std::string& name, const std::optional<std::string>& format);
  /// Where an image of this format records no format of its backing file, that file is not raw, and may be probed.
  bool probes_backing = false;
};

/// Fails with `unsupported` for names of formats that exist elsewhere, with `invalid` for others.
Result<const Format*> format_by_name(std::string_view name);

/// Looks at the first bytes: raw if they belong to no other format. Fails with `unsupported` if they belong to a format
/// that imgfuse does not read, since presenting such a file as a raw disk invites to destroy it.
Result<const Format*> probe_format(Storage& storage);

}  // namespace imgfuse
