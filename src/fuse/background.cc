#include "fuse/background.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <syslog.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <string>

#include "base/log.h"

namespace imgfuse::fuse {
namespace {

constexpr int kFailed = 1;

std::atomic<bool> in_background = false;

void write_log(LogLevel level, const std::string& line) {
  if (in_background)
    ::syslog(level == LogLevel::error ? LOG_ERR : LOG_WARNING, "%s", line.c_str());
  else
    (void)std::fprintf(stderr, "imgfuse: %s\n", line.c_str());
}

/// One byte means ready; the end of the pipe without it means that the daemon has ended.
int wait_for_daemon(const UniqueFd& pipe, pid_t daemon) {
  char byte = 0;
  ssize_t length = 0;
  while ((length = ::read(pipe.get(), &byte, 1)) < 0 && errno == EINTR) continue;
  if (length == 1) return 0;
  int status = 0;
  while (::waitpid(daemon, &status, 0) < 0 && errno == EINTR) continue;
  if (WIFEXITED(status)) return WEXITSTATUS(status);
  log_error("the daemon was ended by signal {}", WTERMSIG(status));
  return kFailed;
}

}  // namespace

std::optional<int> Background::fork() {
  std::array<int, 2> ends;
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) {
    std::perror("imgfuse: pipe");
    return kFailed;
  }
  UniqueFd from_daemon(ends[0]);
  to_parent_ = UniqueFd(ends[1]);
  const pid_t pid = ::fork();
  if (pid < 0) {
    std::perror("imgfuse: fork");
    return kFailed;
  }
  if (pid > 0) {
    to_parent_.reset();
    return wait_for_daemon(from_daemon, pid);
  }
  ::openlog("imgfuse", LOG_PID, LOG_DAEMON);
  set_log_sink(write_log);
  return std::nullopt;
}

void Background::ready() {
  if (!to_parent_) return;
  ::setsid();
  (void)!::chdir("/");
  in_background = true;
  if (const UniqueFd null(::open("/dev/null", O_RDWR | O_CLOEXEC)); null)
    for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) ::dup2(null.get(), stream);
  (void)!::write(to_parent_.get(), "", 1);
  to_parent_.reset();
}

}  // namespace imgfuse::fuse
