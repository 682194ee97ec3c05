// A host file that the kernel reads and writes by itself, so that no request comes here.
#pragma once

#include <cstdint>

#include "imgfuse/error.h"

namespace imgfuse::fuse {

/// Tells the kernel of the file, after it has agreed to passthrough (handshake.h), and returns the number that answers
/// to OPEN name it by; the number lives as long as the session. Needs root: fails with `denied` otherwise.
///
/// All answers to OPEN must name the same number. Those with FOPEN_DIRECT_IO too have their reads and writes come here
/// nevertheless.
Result<int32_t> offer_host_file(int session_fd, int file);

}  // namespace imgfuse::fuse
