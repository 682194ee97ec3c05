#include "overlay.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <stdlib.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "imgfuse/check.h"
#include "imgfuse/create.h"
#include "open_disk.h"

namespace imgfuse::tool {
namespace {

Result<> make_overlay(const std::string& image, const std::string& overlay, const OpenOptions& options) {
  OpenOptions look = options;
  look.read_only = true;
  IMG_LET(const ImageInfo info, image_info(image, look));
  CreateOptions create;
  create.backing_file = image;
  create.backing_format = info.format;
  create.allowed_directories = options.allowed_directories;
  return create_image(overlay, create);
}

/// That it stands on this image, and not on another one that its name was used for before.
Result<> check_overlay(const std::string& image, const std::string& overlay, const OpenOptions& options) {
  IMG_LET(const ImageInfo info, image_info(overlay, {.read_only = true, .force_share = options.force_share}));
  if (info.full_backing_filename && same_file(*info.full_backing_filename, image)) return {};
  return fail(ErrorCode::invalid, "{} is there, and is no overlay of {}", overlay, image);
}

struct Nameless {
  std::string name;  ///< until it is removed
  std::string path;  ///< by which it is found from then on, by this process: its descriptor stays open
};

Result<Nameless> new_name() {
  const char* const folder = ::getenv("TMPDIR");
  std::string name = std::string(folder != nullptr ? folder : "/var/tmp") + "/imgfuse-XXXXXX";
  const int fd = ::mkostemp(name.data(), O_CLOEXEC);
  if (fd < 0) return fail(ErrorCode::io, "make a file {}: {}", name, strerror(errno));
  return Nameless{std::move(name), fmt::format("/proc/self/fd/{}", fd)};
}

}  // namespace

Result<Overlay> open_overlay(const std::string& image, const std::string& overlay, const OpenOptions& options) {
  Overlay result{nullptr, options, overlay};
  OpenOptions& look = result.options;
  look.allowed_directories.push_back(directory_of(image));
  std::string path = overlay;
  std::optional<NewFile> nameless;
  if (path.empty()) {
    IMG_LET(Nameless file, new_name());
    path = file.name;
    nameless.emplace(path);
    nameless->made();
    result.path = std::move(file.path);
  }
  if (nameless || !std::filesystem::exists(path)) {
    IMG_TRY(make_overlay(image, path, look));
  } else {
    IMG_TRY(check_overlay(image, path, look));
  }
  look.format = "qcow2";
  IMG_LET(result.disk, open_disk(path, look));
  return result;
}

}  // namespace imgfuse::tool
