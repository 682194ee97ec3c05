#include "fuse/mountpoint.h"

#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <vector>

namespace imgfuse::fuse {
namespace {

/// mountinfo writes blanks and backslashes as three octal digits.
std::string unescape(const std::string& text) {
  std::string plain;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && i + 3 < text.size()) {
      plain += static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 + (text[i + 3] - '0'));
      i += 3;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

/// "36 35 98:0 /root /path rw,noatime shared:1 … - type source options"
std::optional<MountEntry> parse_line(const std::string& line) {
  std::istringstream fields(line);
  std::string id, parent, device, root, path, flags, field, source, options;
  MountEntry entry;
  if (!(fields >> id >> parent >> device >> root >> path >> flags)) return std::nullopt;
  while (fields >> field && field != "-") continue;
  if (!(fields >> entry.type >> source >> options)) return std::nullopt;
  unsigned major_number = 0;
  unsigned minor_number = 0;
  if (std::sscanf(device.c_str(), "%u:%u", &major_number, &minor_number) != 2) return std::nullopt;
  entry.device = makedev(major_number, minor_number);
  entry.path = unescape(path);
  entry.source = unescape(source);
  if (const size_t user = options.find("user_id="); user != std::string::npos)
    entry.user = static_cast<uid_t>(std::strtoul(options.c_str() + user + std::strlen("user_id="), nullptr, 10));
  return entry;
}

std::optional<std::string> real_path(const std::string& path) {
  char* const resolved = ::realpath(path.c_str(), nullptr);
  if (resolved == nullptr) return std::nullopt;
  std::string result = resolved;
  std::free(resolved);
  return result;
}

ErrorCode code_of(int error) {
  if (error == ENOENT) return ErrorCode::not_found;
  if (error == EACCES || error == EPERM) return ErrorCode::denied;
  if (error == ENOTCONN) return ErrorCode::busy;
  return ErrorCode::invalid;
}

/// Why there can be no mount at `path`, and what to do about it.
tl::unexpected<Error> refuse(const std::string& path, const Error& reason) {
  if (reason.code() == ErrorCode::not_found)
    return fail(ErrorCode::not_found,
                "mount point {0} does not exist; make a file (touch {0}) that becomes the disk, or a directory "
                "(mkdir {0}) in which it appears as disk.raw",
                path);
  if (reason.code() == ErrorCode::busy)
    return fail(ErrorCode::busy, "the mount at {0} has lost its daemon; remove it with \"imgfuse umount {0}\"", path);
  return fail(reason.during("mount point {}", path));
}

}  // namespace

bool is_fuse(const MountEntry& entry) { return entry.type == "fuse" || entry.type.starts_with("fuse."); }

std::vector<MountEntry> mount_table() {
  std::ifstream table("/proc/self/mountinfo");
  std::vector<MountEntry> entries;
  for (std::string line; std::getline(table, line);)
    if (auto entry = parse_line(line)) entries.push_back(std::move(*entry));
  return entries;
}

std::optional<MountEntry> find_mount(const std::string& path) {
  std::optional<MountEntry> found;
  for (MountEntry& entry : mount_table())
    if (entry.path == path) found = std::move(entry);
  return found;
}

Result<std::string> canonical_path(const std::string& path) {
  // The last component is left alone first: asking about it would ask the daemon behind it.
  std::string trimmed = path;
  while (trimmed.size() > 1 && trimmed.ends_with('/')) trimmed.pop_back();
  const size_t slash = trimmed.rfind('/');
  const std::string name = slash == std::string::npos ? trimmed : trimmed.substr(slash + 1);
  if (!name.empty() && name != "." && name != "..") {
    const auto parent = real_path(slash == std::string::npos ? "." : slash == 0 ? "/" : trimmed.substr(0, slash));
    if (!parent) return fail(code_of(errno), "{}", strerror(errno));
    std::string candidate = (*parent == "/" ? "" : *parent) + "/" + name;
    if (find_mount(candidate)) return candidate;
  }
  if (auto resolved = real_path(path)) return *resolved;
  return fail(code_of(errno), "{}", strerror(errno));
}

Result<Mountpoint> check_mountpoint(const std::string& path, const std::string& image) {
  const auto canonical = canonical_path(path);
  if (!canonical) return refuse(path, canonical.error());
  Mountpoint mountpoint = {*canonical, MountpointKind::file};
  const auto mounted = find_mount(mountpoint.path);
  struct stat attributes;
  if (::stat(mountpoint.path.c_str(), &attributes) != 0) return refuse(path, Error(code_of(errno), strerror(errno)));
  if (mounted && mounted->type == "fuse.imgfuse")
    return fail(ErrorCode::busy, "{} is mounted at {} already; unmount it with \"imgfuse umount {}\"", mounted->source,
                path, path);

  if (S_ISDIR(attributes.st_mode)) {
    mountpoint.kind = MountpointKind::directory;
    if (image.starts_with(mountpoint.path == "/" ? "/" : mountpoint.path + "/"))
      return fail(ErrorCode::invalid, "mount point {} contains the image, which the mount would hide", path);
  } else if (!S_ISREG(attributes.st_mode)) {
    return fail(ErrorCode::invalid, "mount point {} is neither a file nor a directory", path);
  }
  return mountpoint;
}

}  // namespace imgfuse::fuse
