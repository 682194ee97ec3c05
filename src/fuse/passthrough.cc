#include "fuse/passthrough.h"

#include <cerrno>
#include <cstring>

#include "fuse/kernel_abi.h"

namespace imgfuse::fuse {

Result<int32_t> offer_host_file(int session_fd, int file) {
  abi::BackingMap map = {.fd = file, .flags = 0, .padding = 0};
  const int number = ::ioctl(session_fd, abi::kBackingOpen, &map);
  if (number > 0) return number;
  return fail(errno == EPERM ? ErrorCode::denied : ErrorCode::unsupported, "the kernel does not take the file: {}",
              strerror(errno));
}

}  // namespace imgfuse::fuse
