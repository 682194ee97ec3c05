// How `imgfuse umount` learns whether the image was closed well.
//
// The daemon listens on a Unix socket whose abstract name holds the mount's device number and the daemon's process id.
// It accepts nobody until the image is closed: connections wait in the kernel. Then each of them gets one line,
// "closed" or "error: TEXT", and the process ends.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "base/unique_fd.h"
#include "imgfuse/error.h"

namespace imgfuse::fuse {

/// The daemon's end.
class CloseReporter {
 public:
  /// `device` is the mount's. Call it in the process that stays.
  static Result<CloseReporter> listen(dev_t device);
  /// Answers everybody who waits.
  void tell(const Result<>& closed);

 private:
  explicit CloseReporter(UniqueFd socket) : socket_(std::move(socket)) {}
  UniqueFd socket_;
};

/// The end of those who wait for one daemon.
class CloseWaiter {
 public:
  /// The daemons of the mount with this device number that are run by `user` or root. Usually one; none if it is gone,
  /// or lives in another network namespace; two for a moment where the number was used before and that daemon is
  /// still closing.
  static std::vector<CloseWaiter> connect(dev_t device, uid_t user);
  /// Blocks until the daemon is gone; returns what it said about the image.
  Result<> wait();

 private:
  CloseWaiter(UniqueFd socket, UniqueFd process) : socket_(std::move(socket)), process_(std::move(process)) {}
  UniqueFd socket_;
  UniqueFd process_;
};

}  // namespace imgfuse::fuse
