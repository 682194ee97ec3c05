#include "fuse/close_report.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <fstream>
#include <optional>
#include <string_view>

namespace imgfuse::fuse {
namespace {

constexpr int kBacklog = 64;
constexpr std::string_view kClosed = "closed\n";
constexpr std::string_view kErrorPrefix = "error: ";

std::string name_prefix(dev_t device) { return fmt::format("imgfuse-{}:{}-", major(device), minor(device)); }

/// Makes `call` with the abstract socket address of that name.
template <class Call>
int with_address(const std::string& name, Call call) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  const size_t length = std::min(name.size(), sizeof address.sun_path - 1);
  std::memcpy(address.sun_path + 1, name.data(), length);  // a name that begins with 0 is abstract
  return call(reinterpret_cast<const sockaddr*>(&address),
              static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + length));
}

UniqueFd stream_socket() { return UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)); }

/// The abstract socket names that begin with `prefix`.
std::vector<std::string> find_names(const std::string& prefix) {
  std::vector<std::string> names;
  std::ifstream table("/proc/net/unix");
  for (std::string line; std::getline(table, line);) {
    const size_t at = line.find(" @" + prefix);
    if (at == std::string::npos) continue;
    const std::string name = line.substr(at + 2);
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  return names;
}

/// Who listens at the other end.
std::optional<ucred> peer(const UniqueFd& socket) {
  ucred credentials = {};
  socklen_t length = sizeof credentials;
  if (::getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) return std::nullopt;
  return credentials;
}

std::string read_all(const UniqueFd& socket) {
  std::string text;
  char piece[256];
  for (;;) {
    const ssize_t n = ::read(socket.get(), piece, sizeof piece);
    if (n > 0)
      text.append(piece, static_cast<size_t>(n));
    else if (n == 0 || errno != EINTR)
      return text;
  }
}

void wait_for_end(const UniqueFd& process) {
  pollfd ended = {process.get(), POLLIN, 0};
  while (::poll(&ended, 1, -1) < 0 && errno == EINTR) continue;
}

}  // namespace

Result<CloseReporter> CloseReporter::listen(dev_t device) {
  UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const std::string name = name_prefix(device) + std::to_string(::getpid());
  const auto bind = [&](const sockaddr* address, socklen_t length) { return ::bind(socket.get(), address, length); };
  if (!socket || with_address(name, bind) != 0 || ::listen(socket.get(), kBacklog) != 0)
    return fail(ErrorCode::io, "listen at @{}: {}", name, strerror(errno));
  return CloseReporter(std::move(socket));
}

void CloseReporter::tell(const Result<>& closed) {
  const std::string line = closed ? std::string(kClosed) : fmt::format("{}{}\n", kErrorPrefix, closed.error().text());
  while (true) {
    const UniqueFd connection(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!connection && errno == ECONNABORTED) continue;
    if (!connection) return;
    (void)::send(connection.get(), line.data(), line.size(), MSG_NOSIGNAL);
  }
}

std::vector<CloseWaiter> CloseWaiter::connect(dev_t device, uid_t user) {
  std::vector<CloseWaiter> waiters;
  const std::string prefix = name_prefix(device);
  for (const std::string& name : find_names(prefix)) {
    UniqueFd socket = stream_socket();
    const auto connect = [&](const sockaddr* address, socklen_t length) {
      return ::connect(socket.get(), address, length);
    };
    if (!socket || with_address(name, connect) != 0) continue;
    const auto daemon = peer(socket);
    if (!daemon || (daemon->uid != user && daemon->uid != 0)) continue;
    if (std::to_string(daemon->pid) != name.substr(prefix.size())) continue;
    UniqueFd process(static_cast<int>(::syscall(SYS_pidfd_open, daemon->pid, 0)));  // glibc 2.36 declares it for C only
    if (process) waiters.push_back(CloseWaiter(std::move(socket), std::move(process)));
  }
  return waiters;
}

Result<> CloseWaiter::wait() {
  const std::string line = read_all(socket_);
  wait_for_end(process_);
  if (line == kClosed) return {};
  if (line.starts_with(kErrorPrefix))
    return fail(ErrorCode::io, "{}", line.substr(kErrorPrefix.size(), line.size() - kErrorPrefix.size() - 1));
  return fail(ErrorCode::io, "the daemon ended before it had closed the image");
}

}  // namespace imgfuse::fuse
