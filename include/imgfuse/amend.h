// Changing what an image's header says, without touching guest data.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "imgfuse/error.h"

namespace imgfuse {

/// What is given is changed; the rest stays.
struct AmendOptions {
  std::optional<std::string> format;  ///< of the image; not probed if given
  std::optional<std::string> compat;  ///< "0.10" or "1.1"
  std::optional<bool> lazy_refcounts;
  std::optional<std::string> backing_format;  ///< "raw", "qcow2" or "qed"
  std::optional<bool> data_file_raw;          ///< only off: that a data file equals the disk cannot be promised later
  std::vector<std::string> allowed_directories;  ///< as in OpenOptions, for a backing file that has to be read
};

/// Changes the image, which nobody may have open. Everything is checked before anything changes; a crash leaves the
/// old or the new header.
Result<> amend_image(const std::string& path, const AmendOptions& options);

/// Records another backing file, by name and format ("raw", "qcow2" or "qed"); an empty name records none. Nothing is
/// copied or compared: what the disk reads as changes unless the two backing files are alike. The name is stored as
/// given and the file not looked at.
Result<> change_backing(const std::string& path, const std::string& name, const std::optional<std::string>& format);

}  // namespace imgfuse
