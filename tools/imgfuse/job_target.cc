#include "job_target.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <filesystem>
#include <fstream>
#include <optional>

#include "imgfuse/check.h"
#include "open_disk.h"

namespace imgfuse::tool {
namespace {

std::optional<dev_t> device_of(const std::string& path) {
  struct stat attributes;
  if (::stat(path.c_str(), &attributes) != 0) return std::nullopt;
  return S_ISBLK(attributes.st_mode) ? attributes.st_rdev : attributes.st_dev;
}

/// The file behind a loop device or a partition of one.
std::optional<std::string> behind_loop(dev_t device) {
  const std::filesystem::path folder = fmt::format("/sys/dev/block/{}:{}", major(device), minor(device));
  std::string path;
  for (const char* const name : {"loop/backing_file", "../loop/backing_file"})
    if (std::ifstream file(folder / name); std::getline(file, path)) return path;
  return std::nullopt;
}

/// Loop devices can stand on each other's files; nobody stacks many of them.
bool lies_in(const std::string& path, dev_t mount) {
  std::optional<std::string> at = path;
  for (int depth = 0; at && depth < 16; ++depth) {
    const auto device = device_of(*at);
    if (!device) return false;
    if (*device == mount) return true;
    at = behind_loop(*device);
  }
  return false;
}

Result<JobTarget> open_target(const OpenOptions& options, const std::string& mountpoint, const std::string& path) {
  const auto mount = device_of(mountpoint);
  if (mount && lies_in(path, *mount))
    return fail(ErrorCode::invalid, "{} lies in the mount {} itself", path, mountpoint);
  OpenOptions look = options;
  look.read_only = look.force_share = true;
  IMG_LET(const ImageInfo info, image_info(path, look));
  IMG_LET(auto disk, open_disk(path, options));
  return JobTarget{std::move(disk), info.backing_filename.has_value()};
}

}  // namespace

CacheMode without_write_through(CacheMode mode) {
  if (mode == CacheMode::writethrough) return CacheMode::writeback;
  return mode == CacheMode::directsync ? CacheMode::none : mode;
}

OpenTarget target_opener(const OpenOptions& mounted, const std::string& image, const std::string& mountpoint) {
  OpenOptions options{.backing_format = mounted.backing_format,
                      .cache = mounted.cache,
                      .compressed_cache = mounted.compressed_cache,
                      .metadata_cache = mounted.metadata_cache,
                      .allowed_directories = mounted.allowed_directories};
  options.allowed_directories.push_back(directory_of(image));
  return [options, mountpoint](const std::string& path, const std::optional<std::string>& format) {
    OpenOptions target = options;
    target.format = format;
    return open_target(target, mountpoint, path);
  };
}

}  // namespace imgfuse::tool
