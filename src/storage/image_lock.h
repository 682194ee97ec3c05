// QEMU's image locks: who may use an image file beside whom.
#pragma once

#include <string>

#include "imgfuse/error.h"

namespace imgfuse {

enum class LockRole {
  none,    ///< takes no lock and minds none (--force-share)
  reader,  ///< reads; suffers other readers, no writer
  writer,  ///< reads, writes and resizes; suffers nobody who writes or who reads as an image format does
  /// The same for the external data file of an image. As in QEMU, who resizes it is kept away from, and with them every
  /// other image that it might be the data file of; not who writes to it as to a raw disk of fixed size.
  data_reader,
  data_writer,
};

/// Takes the lock or fails with `busy`, naming the process that is in the way where it can be seen.
///
/// The locks are open file description read locks on single bytes, as QEMU 2.10 and later take them: byte 100 + i says
/// that the holder uses permission i, byte 200 + i that it does not share it. A conflict is a lock on the opposite
/// byte; since nobody takes write locks, it is asked for. They belong to the open file description: they end when its
/// last descriptor is closed and survive fork(). On a file system without locks this warns and succeeds.
Result<> lock_image(int fd, const std::string& name, LockRole role);

}  // namespace imgfuse
