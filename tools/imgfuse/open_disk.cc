#include "open_disk.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>

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

NewFile::~NewFile() {
  if (made_) ::unlink(path_.c_str());
}

Result<bool> chain_contains(const std::string& path, const OpenOptions& options, const std::string& file) {
  IMG_LET(const std::vector<ImageInfo> chain, chain_info(path, options));
  return std::any_of(chain.begin(), chain.end(), [&](const ImageInfo& image) {
    return same_file(image.filename, file) || (image.full_data_file && same_file(*image.full_data_file, file));
  });
}

Result<uint32_t> find_base(const std::vector<ImageInfo>& chain, const std::optional<std::string>& base) {
  const std::string& top = chain.front().filename;
  if (chain.size() < 2) return fail(ErrorCode::invalid, "{} has no backing file", top);
  if (!base) return 1;
  for (uint32_t i = 1; i < chain.size(); ++i)
    if (same_file(chain[i].filename, *base) || chain[i - 1].backing_filename == *base) return i;
  return fail(ErrorCode::not_found, "{} is not in the backing chain of {}", *base, top);
}

Result<> check_can_be_emptied(const ImageInfo& image) {
  if (image.format == "qed")
    return fail(ErrorCode::unsupported, "{} is a QED image, which cannot be emptied: commit it unmounted",
                image.filename);
  if (image.fvd && image.fvd->base_size < image.virtual_size)
    return fail(ErrorCode::unsupported,
                "{} shows {} bytes of its base and is longer, so it cannot be emptied: commit it unmounted",
                image.filename, image.fvd->base_size);
  return {};
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
