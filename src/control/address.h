// Where the control socket of a daemon lies, and how others find it.
//
// Its name holds the device number of the mount, which /proc/self/mountinfo tells of every mount, and the daemon's
// process id. Its folder depends on the daemon's environment; whoever looks for it takes the path from /proc/net/unix,
// and believes it only after a look at who listens.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "base/unique_fd.h"
#include "imgfuse/error.h"

namespace imgfuse::control {

/// The path for the socket of this process: in $XDG_RUNTIME_DIR/imgfuse, /run/imgfuse or /tmp/imgfuse-UID, the first of
/// them that there can be. Makes the folder for this user alone, and takes none that others can write to.
Result<std::string> own_socket_path(dev_t device);

/// Listens at the path, for this user alone. Also removes the sockets beside it whose daemons were killed.
Result<UniqueFd> listen_at(const std::string& path);

/// A connection to a daemon, and the daemon.
struct Peer {
  UniqueFd socket;
  pid_t pid = 0;
};

/// Connections to the daemons of the mount with this device number that are run by `user` or root. Usually one; none
/// if it is gone, or lives in another network namespace; two for a moment where the number was used before and that
/// daemon is still closing.
std::vector<Peer> connect_to(dev_t device, uid_t user);

/// The user at the other end of a connection.
std::optional<uid_t> user_of(const UniqueFd& connection);

}  // namespace imgfuse::control
