// Calls into a mount that this process serves itself.
//
// A child process makes them, which holds none of our descriptors. If the daemon is killed meanwhile, the kernel closes
// its connection and the child's call ends; a thread of the daemon would wait for the daemon's answer for ever, and
// keep its process, the connection and the image's lock alive with it.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <ctime>
#include <string>

#include "imgfuse/error.h"

namespace imgfuse::fuse {

/// Has the kernel write what it holds of the file (mmap, write-back cache), and waits. An error if `path` is no
/// longer a file of `device`. (syncfs would not do: since Linux 6.18 it does not wait for FUSE.)
Result<> write_back(const std::string& path, dev_t device);

/// Makes the kernel know size and time of the file, which must be one of `device`.
Result<> set_size_and_time(const std::string& path, dev_t device, uint64_t size, timespec modified);

}  // namespace imgfuse::fuse
