// The other end: what subcommands ask of the daemon of a mount.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <string>
#include <vector>

#include "base/unique_fd.h"
#include "control/protocol.h"

namespace imgfuse::control {

/// A connection to one daemon. One thread.
class Client {
 public:
  /// To the daemons of the mount with this device number that are run by `user` or root (see connect_to()).
  static std::vector<Client> connect(dev_t device, uid_t user);

  pid_t pid() const { return pid_; }
  /// Blocks until the command has been executed, or for `patience` at most if that is not 0. After an error there is
  /// nothing more to ask.
  Result<Json> call(const std::string& command, const Json& arguments = Json::object(),
                    std::chrono::seconds patience = {});
  /// Blocks until the daemon is gone; returns what it said about closing its image.
  Result<> wait_closed();

 private:
  Client(UniqueFd socket, UniqueFd process, pid_t pid)
      : socket_(std::move(socket)), process_(std::move(process)), pid_(pid) {}
  /// Empty at the end of the connection.
  std::string read_line();

  UniqueFd socket_;
  UniqueFd process_;
  pid_t pid_;
  std::string received_;  // behind the last line
};

}  // namespace imgfuse::control
