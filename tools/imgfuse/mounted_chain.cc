#include "mounted_chain.h"

#include <sys/stat.h>

#include <filesystem>
#include <map>
#include <utility>

#include "imgfuse/amend.h"
#include "open_disk.h"

namespace imgfuse::tool {
namespace {

class MountedChain final : public ImageChain {
 public:
  MountedChain(OpenOptions options, std::string image, std::string path)
      : options_(std::move(options)), image_(std::move(image)), path_(std::move(path)) {
    (void)check(image_);
  }

  /// The first time, which comes while the image is open, it notes which file that is.
  Result<> check(const std::string& image) override {
    struct stat now;
    const std::string& path = path_of(image);
    const auto known = files_.find(path);
    if (::stat(path.c_str(), &now) != 0) return fail(ErrorCode::not_found, "{} is not where it was", image);
    if (known == files_.end()) {
      files_[path] = {now.st_dev, now.st_ino};
    } else if (known->second != std::pair(now.st_dev, now.st_ino)) {
      return fail(ErrorCode::invalid, "{} leads to another file than the one that is open: its own mount, or a new one",
                  image);
    }
    return {};
  }

 private:
  Result<BackingLayer> find(const std::string& image, const std::optional<std::string>& base) override {
    OpenOptions options = options_for(image);
    options.read_only = options.force_share = true;
    IMG_LET(const std::vector<ImageInfo> chain, chain_info(path_of(image), options));
    IMG_LET(const uint32_t depth, find_base(chain, base));
    return BackingLayer{depth, chain[depth].filename, chain[depth].format};
  }
  Result<std::unique_ptr<Disk>> open(const std::string& image, const std::string& format) override {
    OpenOptions options = options_for(image, format);
    options.copy_in_background = options_.copy_in_background && is_mounted(image);
    return open_disk(path_of(image), options);
  }
  Result<std::unique_ptr<Disk>> open_base(const BackingLayer& base) override {
    return open_disk(base.path, options_for(base.path, base.format));
  }
  Result<std::unique_ptr<Disk>> open_above(const std::string& image, const std::string& format,
                                           const BackingLayer& base, Disk& base_disk) override {
    OpenOptions options = options_for(image, format);
    OpenOptions look = options;
    look.read_only = look.force_share = true;
    IMG_LET(const ImageInfo info, image_info(path_of(image), look));
    IMG_TRY(check_can_be_emptied(info));
    options.chain_end = base.path;
    options.below_end = &base_disk;
    return open_disk(path_of(image), options);
  }
  Result<> set_backing(const std::string& image, const std::optional<BackingLayer>& base) override {
    if (!base) return change_backing(path_of(image), "", std::nullopt);
    OpenOptions look = options_for(image);
    look.read_only = true;
    IMG_LET(const ImageInfo info, image_info(path_of(image), look));
    if (!info.backing_filename) return {};  // it has left what it had by itself
    const std::filesystem::path path = std::filesystem::absolute(base->path);
    const bool beside = path.parent_path() == std::filesystem::path(image).parent_path();
    return change_backing(path_of(image), beside ? path.filename() : path, base->format);
  }
  /// The images in between do not hold what the base does: the image has to stand on the base itself before.
  Result<> empty(const std::string& image, const std::string& format, const BackingLayer& base) override {
    if (base.depth > 1) IMG_TRY(set_backing(image, base));
    OpenOptions options = options_for(image, format);
    options.chain_end = base.path;
    IMG_LET(OpenDisk disk, OpenDisk::open(path_of(image), options));
    IMG_TRY(disk->forget({GuestOffset(0), disk->size()}));
    return disk.close();
  }

  /// What belongs to the image that was mounted is not for others, such as one that a mirror has put in its place.
  /// While a commit empties an image, nobody fills it.
  OpenOptions options_for(const std::string& image, const std::optional<std::string>& format = std::nullopt) const {
    OpenOptions options = options_;
    options.copy_in_background = false;
    if (format) options.format = format;
    if (is_mounted(image)) return options;
    if (!format) options.format = std::nullopt;
    options.data_file = options.compress = options.snapshot = std::nullopt;
    return options;
  }
  /// An image without a name is called by its path once it has been opened again.
  bool is_mounted(const std::string& image) const { return image == image_ || image == path_; }
  const std::string& path_of(const std::string& image) const { return is_mounted(image) ? path_ : image; }

  const OpenOptions options_;
  const std::string image_;
  const std::string path_;
  std::map<std::string, std::pair<dev_t, ino_t>> files_;
};

}  // namespace

std::shared_ptr<ImageChain> mounted_chain(const OpenOptions& mounted, const std::string& image,
                                          const std::string& path) {
  OpenOptions options = mounted;
  options.allowed_directories.push_back(directory_of(image));
  return std::make_shared<MountedChain>(std::move(options), image, path);
}

}  // namespace imgfuse::tool
