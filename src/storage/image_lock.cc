#include "storage/image_lock.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <string_view>
#include <vector>

#include "base/log.h"
#include "storage/host_file.h"

namespace imgfuse {
namespace {

namespace fs = std::filesystem;

constexpr off_t kUsedBase = 100;
constexpr off_t kUnsharedBase = 200;

constexpr off_t kResize = 3;

struct Permission {
  off_t index;
  const char* name;  // QEMU's
  bool writing;
};
constexpr std::array kPermissions = {
    Permission{0, "consistent read", false},
    Permission{1, "write", true},
    Permission{kResize, "resize", true},
};

bool uses(LockRole role, const Permission& permission) {
  return role == LockRole::writer || role == LockRole::data_writer || !permission.writing;
}
/// Readers and writers alike want nobody to write; both let others read.
bool refuses(LockRole role, const Permission& permission) {
  const bool data_file = role == LockRole::data_reader || role == LockRole::data_writer;
  return data_file ? permission.index == kResize : permission.writing;
}

struct flock one_byte(short type, off_t byte) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  return lock;
}

int lock_byte(int fd, off_t byte) {
  struct flock lock = one_byte(F_RDLCK, byte);
  return fcntl(fd, F_OFD_SETLK, &lock) == 0 ? 0 : errno;
}

bool held_by_other(int fd, off_t byte) {
  struct flock lock = one_byte(F_WRLCK, byte);
  return fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

template <class Number>
std::optional<Number> number(std::string_view text) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

/// One line of fdinfo: "lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:10952850 100 101" (the last may be EOF).
bool locks_byte(const std::string& line, ino_t inode, off_t byte) {
  std::istringstream words(line);
  std::string tag, index, kind, mandatory, type, pid, file, first, last;
  words >> tag >> index >> kind >> mandatory >> type >> pid >> file >> first >> last;
  if (tag != "lock:" || !file.ends_with(fmt::format(":{}", inode))) return false;
  const std::optional<off_t> begin = number<off_t>(first);
  const std::optional<off_t> end = number<off_t>(last);
  return begin && *begin <= byte && (last == "EOF" || (end && byte <= *end));
}

/// Whether that descriptor of that process is our file with a lock on the byte. Inode numbers repeat across file
/// systems, so the device is compared too, without asking a remote or FUSE file system, which might hang.
bool holds_lock(const fs::path& process, const std::string& fd, FileId file, off_t byte) {
  std::ifstream info(process / "fdinfo" / fd);
  bool found = false;
  for (std::string line; !found && std::getline(info, line);) found = locks_byte(line, file.inode, byte);
  if (!found) return false;
  struct statx status {};
  if (statx(AT_FDCWD, (process / "fd" / fd).c_str(), AT_STATX_DONT_SYNC, STATX_INO, &status) != 0) return true;
  return makedev(status.stx_dev_major, status.stx_dev_minor) == file.device && status.stx_ino == file.inode;
}

/// Processes come and go while this looks; it gives what it finds.
std::vector<std::string> names_in(const fs::path& directory) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator at(directory, error), end; !error && at != end; at.increment(error))
    names.push_back(at->path().filename());
  return names;
}

/// "qemu-system-x86 (pid 1234)"; processes of other users cannot be looked into.
std::string find_holder(int own_fd, off_t byte) {
  struct stat status {};
  if (fstat(own_fd, &status) != 0) return "another process";
  const FileId file{status.st_dev, status.st_ino};

  for (const std::string& process : names_in("/proc")) {
    const std::optional<pid_t> pid = number<pid_t>(process);
    if (!pid) continue;
    const fs::path folder = fs::path("/proc") / process;
    for (const std::string& fd : names_in(folder / "fdinfo")) {
      if (*pid == getpid() && fd == std::to_string(own_fd)) continue;
      if (!holds_lock(folder, fd, file, byte)) continue;
      if (*pid == getpid()) return fmt::format("this process (pid {}), under this or another name", *pid);
      std::string name = "a process";
      std::ifstream comm(folder / "comm");
      std::getline(comm, name);
      return fmt::format("{} (pid {})", name, *pid);
    }
  }
  return "another process";
}

tl::unexpected<Error> conflict(int fd, const std::string& name, LockRole role, std::string_view what, off_t byte) {
  const bool can_share = role == LockRole::reader || role == LockRole::data_reader;
  return fail(ErrorCode::busy, "Failed to get {} lock: {} is in use by {}{}", what, name, find_holder(fd, byte),
              can_share ? "; to read it while it may change, add --force-share" : "");
}

}  // namespace

Result<> lock_image(int fd, const std::string& name, LockRole role) {
  if (role == LockRole::none) return {};

  for (const Permission& permission : kPermissions) {
    for (const off_t base : {kUsedBase, kUnsharedBase}) {
      if (base == kUsedBase ? !uses(role, permission) : !refuses(role, permission)) continue;
      const off_t byte = base + permission.index;
      const int error = lock_byte(fd, byte);
      if (error == EACCES || error == EAGAIN)  // somebody holds a write lock, which QEMU never does
        return conflict(fd, name, role, fmt::format("\"{}\"", permission.name), byte);
      if (error == EOPNOTSUPP || error == ENOLCK || error == ENOSYS || error == EINVAL) {
        log_warning("{}: its file system has no locks; nothing keeps others from writing to it", name);
        return {};
      }
      if (error != 0) return fail(host_error(error, "lock " + name));
    }
  }

  // Our locks first, the questions second: of two who come at once, at least one sees the other.
  for (const Permission& permission : kPermissions) {
    if (const off_t byte = kUnsharedBase + permission.index; uses(role, permission) && held_by_other(fd, byte))
      return conflict(fd, name, role, fmt::format("\"{}\"", permission.name), byte);
    if (const off_t byte = kUsedBase + permission.index; refuses(role, permission) && held_by_other(fd, byte))
      return conflict(fd, name, role, fmt::format("shared \"{}\"", permission.name), byte);
  }
  return {};
}

}  // namespace imgfuse
