// The start of a daemon.
#pragma once

#include <optional>

#include "base/unique_fd.h"

namespace imgfuse::fuse {

/// A process that goes into the background while its parent waits until it is ready:
///
///     Background background;
///     if (auto status = background.fork()) return *status;   // the parent, when the daemon is ready or has ended
///     …                                                      // the daemon: may still write to the terminal
///     background.ready();                                    // from here on it is alone
class Background {
 public:
  /// In the parent: waits, and returns the exit status: 0 once the daemon is ready, its own if it ends before.
  /// In the daemon: nothing. Call it before there are other threads.
  std::optional<int> fork();
  /// Leaves terminal, session and working directory behind, sends the log to syslog, and lets the parent go.
  /// Any thread of the daemon may call, once. Does nothing without a fork().
  void ready();

 private:
  UniqueFd to_parent_;
};

}  // namespace imgfuse::fuse
