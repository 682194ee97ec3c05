// What the kernel and a daemon tell each other that the headers of older distributions do not have; from
// include/uapi/linux/fuse.h, protocol 7.42 (FUSE over io_uring, Linux 6.14; passthrough, Linux 6.9).
#pragma once

#include <sys/ioctl.h>

#include <cstddef>
#include <cstdint>

namespace imgfuse::fuse::abi {

/// In the flags of INIT, 64 bits of which the upper half is called flags2.
inline constexpr uint64_t kInitExtended = uint64_t{1} << 30;
inline constexpr uint64_t kPassthrough = uint64_t{1} << 37;
inline constexpr uint64_t kOverRing = uint64_t{1} << 41;

// ---- io_uring

inline constexpr uint32_t kRegister = 1;        ///< here are buffers, give me a request
inline constexpr uint32_t kCommitAndFetch = 2;  ///< here is the answer, give me the next one

/// The first of an entry's two buffers. The second, the payload, holds what does not fit in here: of a request all
/// arguments but the first, of an answer all.
struct EntryHeader {
  std::byte in_out[128];     ///< fuse_in_header, or fuse_out_header
  std::byte operation[128];  ///< the request's first argument
  uint64_t flags;
  uint64_t commit_id;
  uint32_t payload_size;
  uint32_t padding;
  uint64_t reserved;
};
static_assert(sizeof(EntryHeader) == 288);

/// The last 80 bytes of a submission queue entry begin with it.
struct Command {
  uint64_t flags;
  uint64_t commit_id;
  uint16_t queue;
  uint8_t padding[6];
};

// ---- Passthrough

/// In the answer to OPEN, and where its number of the host file lies there (fuse_open_out's padding, once).
inline constexpr uint32_t kOpenPassthrough = 1 << 7;

/// The argument of kBackingOpen, which returns the number or -1.
struct BackingMap {
  int32_t fd;
  uint32_t flags;
  uint64_t padding;
};
inline constexpr unsigned long kBackingOpen = _IOW(229, 1, BackingMap);

}  // namespace imgfuse::fuse::abi
