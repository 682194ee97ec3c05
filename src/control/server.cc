#include "control/server.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <functional>
#include <utility>
#include <vector>

#include "base/log.h"
#include "control/address.h"

namespace imgfuse::control {
namespace {

/// More wait in the kernel until others have hung up.
constexpr size_t kMaxConnections = 64;
/// For the rest of a line, and for taking an answer.
constexpr std::chrono::seconds kPatience(10);
/// The folder of the socket can be removed when its user logs out.
constexpr std::chrono::seconds kSocketCheck(60);
constexpr std::chrono::milliseconds kTick(1000);

void send_some(const UniqueFd& socket, std::string& text) {
  const ssize_t sent = ::send(socket.get(), text.data(), text.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  if (sent > 0) text.erase(0, static_cast<size_t>(sent));
}

}  // namespace

/// Reads while there is nothing to be written, so that a client cannot pile up answers.
struct Server::Connection {
  explicit Connection(UniqueFd connected) : socket(std::move(connected)) {}

  /// In the middle of a line or of an answer. Who is not may stay for as long as it likes.
  bool is_due() const { return !out.empty() || !in.empty(); }

  UniqueFd socket;
  std::string in;   // no whole line
  std::string out;  // not taken yet
  bool hung_up = false;
  Clock::time_point last_progress = Clock::now();
};

Result<std::unique_ptr<Server>> Server::listen(dev_t device) {
  IMG_LET(std::string path, own_socket_path(device));
  IMG_LET(UniqueFd socket, listen_at(path));
  return std::unique_ptr<Server>(new Server(device, std::move(path), std::move(socket)));
}

Server::Server(dev_t device, std::string path, UniqueFd socket)
    : device_(device), path_(std::move(path)), socket_(std::move(socket)), wake_(::eventfd(0, EFD_CLOEXEC)) {}

Server::~Server() {
  quiesce();
  (void)::unlink(path_.c_str());
}

void Server::start(Handler handler) {
  handler_ = std::move(handler);
  const Lock lock(joining_);
  thread_ = std::thread([this] { run(); });
}

void Server::quiesce() {
  ending_ = true;
  const uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof one);
  const Lock lock(joining_);
  if (thread_.joinable()) thread_.join();
}

void Server::tell_closed(const Result<>& closed) {
  while (true) {
    UniqueFd client(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!client && (errno == ECONNABORTED || errno == EINTR)) continue;
    if (!client) break;
    if (user_of(client) == ::geteuid() || user_of(client) == uid_t{0}) connections_.emplace_back(std::move(client));
  }
  const std::string line = format_closed(closed);
  for (Connection& connection : connections_) {
    connection.out += line;
    send_some(connection.socket, connection.out);
  }
  connections_.clear();
}

void Server::run() {
  while (!ending_) {
    drop_late_clients(wait());
    restore_socket();
  }
}

/// Serves what there is to serve, and returns when it began: who was late then has had his turn.
Server::Clock::time_point Server::wait() {
  const bool room = connections_.size() < kMaxConnections;
  std::vector<pollfd> sources = {{wake_.get(), POLLIN, 0}, {room ? socket_.get() : -1, POLLIN, 0}};
  for (const Connection& connection : connections_)
    sources.push_back({connection.socket.get(), static_cast<short>(connection.out.empty() ? POLLIN : POLLOUT), 0});
  const bool somebody_is_due = std::any_of(connections_.begin(), connections_.end(), std::mem_fn(&Connection::is_due));
  const auto timeout = somebody_is_due ? kTick : std::chrono::milliseconds(kSocketCheck);
  const int ready = ::poll(sources.data(), sources.size(), static_cast<int>(timeout.count()));
  const auto awake = Clock::now();
  if (ready <= 0 || ending_) return awake;

  size_t next = 2;
  for (auto at = connections_.begin(); at != connections_.end() && !ending_; ++next) {
    if (sources[next].revents != 0) serve(*at, sources[next].revents);
    at = at->hung_up ? connections_.erase(at) : std::next(at);
  }
  if (sources[1].revents != 0) accept_client();
  return awake;
}

void Server::accept_client() {
  UniqueFd client(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!client) return;
  const auto user = user_of(client);
  if (user == ::geteuid() || user == uid_t{0}) {
    connections_.emplace_back(std::move(client));
    return;
  }
  std::string line = format_answer(fail(ErrorCode::denied, "this daemon serves another user"), Json());
  send_some(client, line);
}

void Server::serve(Connection& connection, short events) {
  if (!connection.out.empty()) {
    const size_t before = connection.out.size();
    send_some(connection.socket, connection.out);
    if (connection.out.size() < before) connection.last_progress = Clock::now();
    if ((events & (POLLHUP | POLLERR)) != 0) connection.hung_up = true;
  } else {
    receive(connection);
  }
  if (!connection.hung_up && connection.out.empty()) answer_lines(connection);
}

void Server::receive(Connection& connection) {
  std::array<char, 16384> piece;
  const ssize_t length = ::recv(connection.socket.get(), piece.data(), piece.size(), MSG_DONTWAIT);
  if (length < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (length <= 0) {
    connection.hung_up = true;
    return;
  }
  if (connection.in.empty()) connection.last_progress = Clock::now();
  connection.in.append(piece.data(), static_cast<size_t>(length));
}

/// Until one of the answers is not taken at once: what was sent beyond it stays where it is.
void Server::answer_lines(Connection& connection) {
  while (connection.out.empty() && !connection.hung_up && !ending_) {
    const size_t end = connection.in.find('\n');
    if (std::min(end, connection.in.size()) > kMaxRequestLength) {
      connection.out =
          format_answer(fail(ErrorCode::invalid, "a line of more than {} bytes", kMaxRequestLength), Json());
      send_some(connection.socket, connection.out);
      connection.hung_up = true;
      return;
    }
    if (end == std::string::npos) return;
    const std::string line = connection.in.substr(0, end);
    connection.in.erase(0, end + 1);
    answer(connection, line);
    connection.last_progress = Clock::now();
  }
}

void Server::answer(Connection& connection, std::string_view line) {
  const auto request = parse_request(line);
  connection.out =
      request ? format_answer(handler_(*request), request->id) : format_answer(fail(request.error()), Json());
  send_some(connection.socket, connection.out);
}

void Server::drop_late_clients(Clock::time_point now) {
  connections_.remove_if([now](const Connection& connection) {
    return connection.is_due() && now - connection.last_progress > kPatience;
  });
}

void Server::restore_socket() {
  const auto now = Clock::now();
  if (now - looked_at_socket_ < kSocketCheck) return;
  looked_at_socket_ = now;
  struct stat attributes;
  if (::lstat(path_.c_str(), &attributes) == 0 || errno != ENOENT) return;
  auto path = own_socket_path(device_);
  auto socket = path ? listen_at(*path) : fail(path.error());
  if (!socket) {
    log_warning("the control socket {} is gone: {}", path_, socket.error().text());
    return;
  }
  path_ = *path;
  socket_ = std::move(*socket);
}

}  // namespace imgfuse::control
