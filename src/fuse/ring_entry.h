// One request that comes over a ring, in memory that the kernel shares.
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstdint>
#include <optional>

#include "base/no_wait.h"
#include "fuse/kernel_abi.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"

struct fuse_session;

namespace imgfuse::fuse {

/// The buffers of one request at a time: header and payload, which the kernel fills, and a page before the payload,
/// where what comes before it is put together as libfuse expects it. The answer is made in the same buffers.
///
/// Belongs to the kernel or to one thread.
class RingEntry {
 public:
  RingEntry() = default;
  ~RingEntry();
  RingEntry(const RingEntry&) = delete;
  RingEntry& operator=(const RingEntry&) = delete;

  /// Memory, of which the host gives pages when they are touched.
  Result<> make();
  /// What the kernel is told: where header and payload lie. Must stay where it is until the kernel has read it.
  const std::array<iovec, 2>& buffers() const { return buffers_; }

  uint32_t opcode() const;
  /// Bytes that a READ or WRITE is about, else 0.
  uint32_t length() const;
  uint64_t commit_id() const { return header().commit_id; }

  /// Has the session's handlers answer the request; one that they do not answer, or that makes no sense, gets EIO.
  void answer(fuse_session* session);
  /// The same for a READ, without waiting for a disk: false if it would have to, and is as if it had not been asked.
  bool try_answer(fuse_session* session, NoWait& hurry);

  /// In a handler: where an answer of that many bytes can be made so that it is not copied. None where the request came
  /// by another way.
  static std::optional<Bytes> room(size_t length);
  /// From the session's writev: the number of bytes if the answer belongs to a request that came over a ring.
  static std::optional<ssize_t> take_answer(const iovec* parts, int count);

 private:
  abi::EntryHeader& header() const { return *reinterpret_cast<abi::EntryHeader*>(memory_); }
  std::byte* payload() const;
  std::optional<Bytes> assemble();

  std::byte* memory_ = nullptr;
  std::array<iovec, 2> buffers_ = {};
  bool answered_ = false;
};

}  // namespace imgfuse::fuse
