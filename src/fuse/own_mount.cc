#include "fuse/own_mount.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <climits>
#include <cstring>

namespace imgfuse::fuse {
namespace {

/// `call` returns an errno and makes async-signal-safe calls only: our other threads are not in the child.
template <class Call>
Result<> in_child(const std::string& path, Call call) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::close_range(STDERR_FILENO + 1, UINT_MAX, 0);
    ::_exit(call());
  }
  int status = 0;
  while (child > 0 && ::waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
  if (child > 0 && status == 0) return {};
  const int error = child < 0 ? errno : WIFEXITED(status) ? WEXITSTATUS(status) : EINTR;
  return fail(ErrorCode::io, "{}: {}", path, strerror(error));
}

}  // namespace

Result<> write_back(const std::string& path, dev_t device) {
  return in_child(path, [&] {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat attributes;
    if (fd < 0 || ::fstat(fd, &attributes) != 0) return errno;
    if (attributes.st_dev != device) return ESTALE;  // hidden by another mount: what is dirty in ours stays unwritten
    return ::fsync(fd) == 0 ? 0 : errno;
  });
}

Result<> set_size_and_time(const std::string& path, dev_t device, uint64_t size, timespec modified) {
  const std::array<timespec, 2> times = {timespec{0, UTIME_OMIT}, modified};
  return in_child(path, [&] {
    const int fd = ::open(path.c_str(), O_WRONLY | O_CLOEXEC);
    struct stat attributes;
    if (fd < 0 || ::fstat(fd, &attributes) != 0) return errno;
    if (attributes.st_dev != device) return ESTALE;
    const bool done = ::ftruncate(fd, static_cast<off_t>(size)) == 0 && ::futimens(fd, times.data()) == 0;
    return done ? 0 : errno;
  });
}

}  // namespace imgfuse::fuse
