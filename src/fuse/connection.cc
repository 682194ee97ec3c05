#include "fuse/connection.h"

#include <fuse_lowlevel.h>
#include <unistd.h>

#include "base/log.h"
#include "fuse/operations.h"
#include "fuse/passthrough.h"
#include "fuse/ring_entry.h"

namespace imgfuse::fuse {
namespace {

Connection& connection_of(void* userdata) { return *static_cast<Served*>(userdata)->connection; }

}  // namespace

void Connection::attach(fuse_session* session) {
  session_ = session;
  if (options_.rings != Rings::off) make_rings();
  handshake_.want({.rings = rings_ != nullptr, .passthrough = options_.passthrough});
  if (!rings_ && !options_.passthrough) return;
  const fuse_custom_io io = {
      .writev = write_answer, .read = read_request, .splice_receive = nullptr, .splice_send = nullptr};
  agreed_ = false;
  if (fuse_session_custom_io(session, &io, fuse_session_fd(session)) == 0) return;
  agreed_ = true;
  cannot(options_.rings == Rings::on || options_.passthrough, "io_uring and passthrough", "libfuse does not allow it");
  rings_.reset();
}

void Connection::stop() {
  if (rings_) rings_->stop();
}

ssize_t Connection::read_request(int fd, void* buffer, size_t size, void* userdata) {
  const ssize_t length = ::read(fd, buffer, size);
  if (length > 0)
    connection_of(userdata).handshake_.look_at({static_cast<std::byte*>(buffer), static_cast<size_t>(length)});
  return length;
}

ssize_t Connection::write_answer(int fd, iovec* parts, int count, void* userdata) {
  if (const auto taken = RingEntry::take_answer(parts, count)) return *taken;
  Connection& connection = connection_of(userdata);
  const bool was_init = connection.handshake_.complete(parts, count);
  const ssize_t written = ::writev(fd, parts, count);
  if (was_init && written > 0) connection.use_extras();
  return written;
}

void Connection::make_rings() {
  // When a daemon with rings dies, the kernel ends the connection a little later: after fusermount3 has seen that the
  // daemon is gone, has found the mount alive, and left it.
  if (options_.auto_unmount) return cannot(options_.rings == Rings::on, "FUSE over io_uring", "auto_unmount");
  auto made = RingTransport::make();
  if (made)
    rings_ = std::move(*made);
  else
    cannot(options_.rings == Rings::on, "FUSE over io_uring", made.error().text());
}

/// The answer to INIT has just been sent.
void Connection::use_extras() {
  const Extras extras = handshake_.agreed();
  if (options_.passthrough) {
    if (extras.passthrough)
      pass_through();
    else
      cannot(true, "passthrough", "the kernel does not offer it");
  }
  if (extras.rings) {
    rings_->start(session_);
    rings_started_ = true;
  } else if (rings_) {
    cannot(options_.rings == Rings::on, "FUSE over io_uring", "the kernel does not offer it");
  }
  agreed_ = true;
  agreed_.notify_all();
}

void Connection::pass_through() {
  const int file = file_.disk().share_host_file();
  if (file < 0) return cannot(true, "passthrough", "the image is no host file of the same bytes");
  if (const auto number = offer_host_file(fuse_session_fd(session_), file))
    file_.set_host_file(*number);
  else
    cannot(true, "passthrough", number.error().text());
}

void Connection::cannot(bool asked, std::string_view what, std::string_view why) const {
  if (asked || options_.debug) log_warning("no {}: {}", what, why);
}

}  // namespace imgfuse::fuse
