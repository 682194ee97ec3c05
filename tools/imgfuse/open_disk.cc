#include "open_disk.h"

#include <algorithm>
#include <filesystem>

#include "imgfuse/check.h"

namespace imgfuse::tool {

Result<OpenDisk> OpenDisk::open(const std::string& path, const OpenOptions& options) {
  IMG_LET(auto disk, open_disk(path, options));
  return OpenDisk(std::move(disk), path);
}

OpenDisk::~OpenDisk() {
  if (disk_) (void)disk_->close();
}

Result<> OpenDisk::close() {
  auto closed = std::exchange(disk_, nullptr)->close();
  if (!closed) return fail(closed.error().during("close {}", path_));
  return {};
}

Result<bool> chain_contains(const std::string& path, const OpenOptions& options, const std::string& file) {
  IMG_LET(const std::vector<ImageInfo> chain, chain_info(path, options));
  return std::any_of(chain.begin(), chain.end(), [&](const ImageInfo& image) {
    return same_file(image.filename, file) || (image.full_data_file && same_file(*image.full_data_file, file));
  });
}

bool same_file(const std::string& a, const std::string& b) {
  std::error_code ignored;
  return std::filesystem::equivalent(a, b, ignored);
}

std::string directory_of(const std::string& path) {
  const std::string directory = std::filesystem::path(path).parent_path();
  return directory.empty() ? "." : directory;
}

}  // namespace imgfuse::tool
