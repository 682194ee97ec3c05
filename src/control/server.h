// The daemon's end of its control socket.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <string_view>
#include <thread>

#include "base/mutex.h"
#include "base/unique_fd.h"
#include "control/protocol.h"

namespace imgfuse::control {

/// Answers one client after the other, in one thread of its own that no request for data ever waits for. Clients of
/// other users are turned away. A client can keep the others waiting only for as long as its command runs: lines have
/// a limit, and who stops in the middle of one, or does not take an answer, is cut off.
///
///     listen() ──► start() ──► quiesce() ──► tell_closed()
///
/// Between listen() and start() clients wait, between quiesce() and tell_closed() too. Every connection that is open
/// at the end gets the line that says how the image was closed: `imgfuse umount` connects and waits for it.
class Server {
 public:
  using Handler = std::function<Result<Json>(const Request&)>;

  /// `device` is the mount's. Call it in the process that stays.
  static Result<std::unique_ptr<Server>> listen(dev_t device);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  /// `handler` is called in the server's thread.
  void start(Handler handler);
  /// Returns when the command that runs has ended; no other begins. Any thread may call, any number of times.
  void quiesce() EXCLUDES(joining_);
  /// After quiesce(). Says the last word to everybody and hangs up.
  void tell_closed(const Result<>& closed);

  const std::string& path() const { return path_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Connection;

  Server(dev_t device, std::string path, UniqueFd socket);
  void run();
  Clock::time_point wait();
  void accept_client();
  void serve(Connection& connection, short events);
  void receive(Connection& connection);
  void answer_lines(Connection& connection);
  void answer(Connection& connection, std::string_view line);
  void drop_late_clients(Clock::time_point now);
  void restore_socket();

  const dev_t device_;
  std::string path_;
  UniqueFd socket_;
  UniqueFd wake_;
  Handler handler_;
  std::list<Connection> connections_;
  Clock::time_point looked_at_socket_ = Clock::now();
  std::atomic<bool> ending_ = false;
  Mutex joining_;
  std::thread thread_ GUARDED_BY(joining_);
};

}  // namespace imgfuse::control
