// Disks as the subcommands hold them.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "imgfuse/check.h"
#include "imgfuse/open.h"

namespace imgfuse::tool {

/// An open disk that is closed at its end in any case; close() tells how that went.
class OpenDisk {
 public:
  static Result<OpenDisk> open(const std::string& path, const OpenOptions& options);
  OpenDisk(OpenDisk&&) = default;
  OpenDisk& operator=(OpenDisk&&) = delete;
  ~OpenDisk();

  Disk& operator*() const { return *disk_; }
  Disk* operator->() const { return disk_.get(); }
  Result<> close();

 private:
  explicit OpenDisk(std::unique_ptr<Disk> disk, std::string path) : disk_(std::move(disk)), path_(std::move(path)) {}

  std::unique_ptr<Disk> disk_;
  std::string path_;
};

/// Removes a file that was made here unless it is kept.
class NewFile {
 public:
  explicit NewFile(std::string path) : path_(std::move(path)) {}
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;
  ~NewFile();
  void made() { made_ = true; }
  void keep() { made_ = false; }

 private:
  const std::string path_;
  bool made_ = false;
};

/// Whether `file` is one of the images in the chain of the image at `path`.
Result<bool> chain_contains(const std::string& path, const OpenOptions& options, const std::string& file);
/// The place of the base in a chain, top first: 1 is the top's own backing file, and what is taken without a base. The
/// base is a path, or the name that an image has for it.
Result<uint32_t> find_base(const std::vector<ImageInfo>& chain, const std::optional<std::string>& base);
/// That an image can give up what it holds, so that the one below it shows in its place everywhere.
Result<> check_can_be_emptied(const ImageInfo& image);
/// Whether two names lead to one file.
bool same_file(const std::string& a, const std::string& b);
/// The directory in which a file lies.
std::string directory_of(const std::string& path);

}  // namespace imgfuse::tool
