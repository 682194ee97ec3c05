// FUSE over io_uring: requests and answers in shared buffers, a queue for each CPU.
#pragma once

#include <memory>
#include <vector>

#include "base/unique_fd.h"
#include "imgfuse/error.h"

struct fuse_session;

namespace imgfuse::fuse {

class RingHelpers;
class RingQueue;

/// Answers a session's requests beside the loop that reads /dev/fuse, which goes on: the kernel sends it what cannot go
/// over a ring. A request that comes over a ring is put together as libfuse expects it and given to
/// fuse_session_process_buf(), so the handlers are the same; the answer, which libfuse writes with writev(), is taken
/// back by RingEntry::take_answer().
///
/// Each queue has a thread that is bound to its CPU, since what is answered where it was asked needs no wake-up of
/// another CPU. A read whose bytes are not in memory waits in the same ring until the host has them, and holds up no
/// other (base/no_wait.h). Requests that are likely to wait for a disk otherwise go to helper threads, which the queues
/// share.
///
///     make() ──► the kernel agrees (handshake.h) ──► start() ──► stop()
class RingTransport {
 public:
  /// Rings and buffers, if the kernel may offer to use them and enough files may be open; nothing is said to the
  /// kernel's FUSE yet.
  static Result<std::unique_ptr<RingTransport>> make();
  ~RingTransport();

  /// After the answer to INIT has been sent. The session must outlive stop().
  void start(fuse_session* session);
  /// When the connection has ended, or shall be left. Waits for the handlers.
  void stop();

 private:
  RingTransport();

  std::vector<std::unique_ptr<RingQueue>> queues_;
  std::unique_ptr<RingHelpers> helpers_;
  UniqueFd fd_;  // the session's, which it closes when it is unmounted
};

}  // namespace imgfuse::fuse
