#include "control/client.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>

#include "control/address.h"

namespace imgfuse::control {

std::vector<Client> Client::connect(dev_t device, uid_t user) {
  std::vector<Client> clients;
  for (Peer& peer : connect_to(device, user)) {
    UniqueFd process(static_cast<int>(::syscall(SYS_pidfd_open, peer.pid, 0)));  // glibc 2.36 declares it for C only
    if (process) clients.push_back(Client(std::move(peer.socket), std::move(process), peer.pid));
  }
  return clients;
}

std::string Client::read_line() {
  size_t searched = 0;
  while (true) {
    if (const size_t end = received_.find('\n', searched); end != std::string::npos) {
      std::string line = received_.substr(0, end);
      received_.erase(0, end + 1);
      return line;
    }
    searched = received_.size();
    std::array<char, 16384> piece;
    const ssize_t length = ::read(socket_.get(), piece.data(), piece.size());
    if (length > 0)
      received_.append(piece.data(), static_cast<size_t>(length));
    else if (length == 0 || errno != EINTR)
      return {};
  }
}

Result<Json> Client::call(const std::string& command, const Json& arguments, std::chrono::seconds patience) {
  const timeval timeout = {static_cast<time_t>(patience.count()), 0};
  ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
  const std::string line = format_request({command, arguments, {}});
  for (size_t sent = 0; sent < line.size();) {
    const ssize_t length = ::send(socket_.get(), line.data() + sent, line.size() - sent, MSG_NOSIGNAL);
    if (length < 0 && errno == EINTR) continue;
    if (length < 0) return fail(ErrorCode::busy, "its daemon (process {}) has hung up", pid_);
    sent += static_cast<size_t>(length);
  }
  const std::string answer = read_line();
  if (answer.empty()) return fail(ErrorCode::io, "its daemon (process {}) ended before it had answered", pid_);
  if (parse_closed(answer)) return fail(ErrorCode::busy, "its daemon (process {}) has closed the image", pid_);
  return parse_answer(answer);
}

Result<> Client::wait_closed() {
  std::optional<Result<>> closed;
  for (std::string line = read_line(); !line.empty(); line = read_line()) closed = parse_closed(line);
  pollfd ended = {process_.get(), POLLIN, 0};
  while (::poll(&ended, 1, -1) < 0 && errno == EINTR) continue;
  if (closed) return *closed;
  return fail(ErrorCode::io, "the daemon ended before it had closed the image");
}

}  // namespace imgfuse::control
