#include "open/path_policy.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>

#include "storage/host_file.h"

namespace imgfuse {
namespace {

namespace fs = std::filesystem;

bool has_protocol(std::string_view name) {
  const size_t at = name.find_first_of(":/");
  return at != std::string_view::npos && name[at] == ':';
}

Result<std::string> canonical_directory(const fs::path& path) {
  std::error_code error;
  const fs::path canonical = fs::canonical(path, error);
  if (error) return fail(host_error(error.value()));
  return canonical.native();
}

/// Where the kernel says that the file lies, confirmed by looking there: a deleted file or one in another mount
/// namespace has a text that only looks like a path.
Result<std::string> path_of(int fd, const struct stat& status) {
  std::error_code error;
  const fs::path path = fs::read_symlink(fmt::format("/proc/self/fd/{}", fd), error);
  if (error) return fail(host_error(error.value(), "find its path in /proc"));
  struct stat found {};
  if (stat(path.c_str(), &found) != 0 || found.st_dev != status.st_dev || found.st_ino != status.st_ino)
    return fail(ErrorCode::denied, "it cannot be told in which directory it lies");
  return path.native();
}

Result<> check_name(const std::string& name) {
  if (name.empty()) return fail(ErrorCode::corrupt, "its name is empty");
  if (name.find('\0') != std::string::npos) return fail(ErrorCode::corrupt, "its name contains a zero byte");
  if (has_protocol(name))
    return fail(ErrorCode::denied, "{} is a protocol, and only files are opened; a file of that name is ./{}",
                printable(name.substr(0, name.find(':') + 1)), printable(name));
  return {};
}

}  // namespace

std::string resolve_name(std::string_view naming_path, std::string_view name) {
  if (name.starts_with('/') || has_protocol(name)) return std::string(name);
  const size_t slash = naming_path.rfind('/');
  if (slash == std::string_view::npos) return std::string(name);
  return std::string(naming_path.substr(0, slash + 1)) + std::string(name);
}

std::string printable(std::string_view name) {
  std::string text(name);
  std::replace_if(
      text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }, '?');
  return text;
}

Result<PathPolicy> PathPolicy::create(const std::string& image_path,
                                      const std::vector<std::string>& allowed_directories) {
  const fs::path directory = fs::path(image_path).parent_path();
  std::vector<std::string> directories;
  IMG_LET(std::string own, canonical_directory(directory.empty() ? "." : directory));
  directories.push_back(std::move(own));
  for (const std::string& allowed : allowed_directories) {
    auto canonical = canonical_directory(allowed);
    if (!canonical) return fail(canonical.error().during("--allow-path {}", allowed));
    directories.push_back(std::move(*canonical));
  }
  return PathPolicy(std::move(directories));
}

bool PathPolicy::allows(const std::string& canonical_path) const {
  return std::any_of(directories_.begin(), directories_.end(), [&](const std::string& directory) {
    if (directory == "/" || canonical_path == directory) return true;
    return canonical_path.starts_with(directory) && canonical_path[directory.size()] == '/';
  });
}

Result<> PathPolicy::check_place(const std::string& canonical_path, const std::string& directory) const {
  if (allows(canonical_path)) return {};
  return fail(ErrorCode::denied, "{} is outside the image's directory; to allow it, add --allow-path {}",
              printable(canonical_path), printable(directory));
}

Result<std::optional<UniqueFd>> PathPolicy::make(const std::string& name, const std::string& naming_path) const {
  IMG_TRY(check_name(name));
  const fs::path path = resolve_name(naming_path, name);
  const std::string directory = path.parent_path().empty() ? "." : path.parent_path();
  const UniqueFd held(::open(directory.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  struct stat status {};
  if (!held || fstat(held.get(), &status) != 0) return fail(host_error(errno));
  IMG_LET(const std::string canonical, path_of(held.get(), status));
  if (!path.has_filename()) return fail(ErrorCode::invalid, "is a directory, not an image");
  IMG_TRY(check_place(fs::path(canonical) / path.filename(), canonical));
  UniqueFd fd(openat(held.get(), path.filename().c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  if (!fd && errno == EEXIST) return std::nullopt;
  if (!fd) return fail(host_error(errno));
  return fd;
}

Result<UniqueFd> PathPolicy::open(const std::string& name, const std::string& naming_path, Access access) const {
  IMG_TRY(check_name(name));
  const std::string path = resolve_name(naming_path, name);
  const UniqueFd held(::open(path.c_str(), O_PATH | O_CLOEXEC));
  if (!held) return fail(host_error(errno));
  struct stat status {};
  if (fstat(held.get(), &status) != 0) return fail(host_error(errno));

  IMG_LET(const std::string canonical, path_of(held.get(), status));
  IMG_TRY(check_place(canonical, fs::path(canonical).parent_path()));
  if (S_ISDIR(status.st_mode)) return fail(ErrorCode::invalid, "is a directory, not an image");
  if (!S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode))
    return fail(ErrorCode::invalid, "is neither a regular file nor a block device");

  const int mode = access == Access::write ? O_RDWR : O_RDONLY;
  UniqueFd fd(::open(fmt::format("/proc/self/fd/{}", held.get()).c_str(), mode | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
  if (!fd) return fail(host_error(errno));
  return fd;
}

}  // namespace imgfuse
