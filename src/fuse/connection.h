// By which ways requests come, beyond what libfuse knows of.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <memory>

#include "fuse/handshake.h"
#include "fuse/options.h"
#include "fuse/raw_file.h"
#include "fuse/ring_transport.h"

struct fuse_session;

namespace imgfuse::fuse {

/// The connection of a session with the kernel. Requests come by /dev/fuse; over rings, where the kernel can do so and
/// the user lets it; or not at all, where the kernel reads and writes the host file by itself (passthrough). What
/// cannot be had is done without; somebody who asked for it, or wants to see all (`debug`), is told once.
class Connection {
 public:
  /// Borrows the file.
  Connection(const MountOptions& options, RawFile& file) : options_(options), file_(file) {}

  /// When the session is mounted, before its first request. Its userdata is a Served that names this.
  void attach(fuse_session* session);
  /// For the handler of OPEN: waits until it is known whether the kernel passes requests by us, since all openers of a
  /// file must have the same answer.
  void wait_until_agreed() { agreed_.wait(false); }
  /// After the session's loop: waits for handlers.
  void stop();

  bool has_rings() const { return rings_started_; }
  bool passes_through() const { return file_.host_file() != 0; }

 private:
  static ssize_t read_request(int fd, void* buffer, size_t size, void* userdata);
  static ssize_t write_answer(int fd, iovec* parts, int count, void* userdata);
  void make_rings();
  void use_extras();
  void pass_through();
  void cannot(bool asked, std::string_view what, std::string_view why) const;

  const MountOptions& options_;
  RawFile& file_;
  fuse_session* session_ = nullptr;
  Handshake handshake_;
  std::unique_ptr<RingTransport> rings_;
  std::atomic<bool> rings_started_ = false;
  std::atomic<bool> agreed_ = true;  // false from attach() to the answer to INIT
};

}  // namespace imgfuse::fuse
