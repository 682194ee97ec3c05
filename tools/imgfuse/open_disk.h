// Disks as the subcommands hold them.
#pragma once

#include <memory>
#include <string>
#include <utility>

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

/// Whether `file` is one of the images in the chain of the image at `path`.
Result<bool> chain_contains(const std::string& path, const OpenOptions& options, const std::string& file);
/// Whether two names lead to one file.
bool same_file(const std::string& a, const std::string& b);
/// The directory in which a file lies.
std::string directory_of(const std::string& path);

}  // namespace imgfuse::tool
