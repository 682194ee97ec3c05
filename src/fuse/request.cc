#include "fuse/request.h"

#include <linux/fuse.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "base/log.h"
#include "base/mutex.h"
#include "base/no_wait.h"

namespace imgfuse::fuse {
namespace {

/// Remembers the last line, so that a latched disk under load does not fill the log.
class OnceLog {
 public:
  void error(const std::string& text) EXCLUDES(mutex_) {
    {
      const Lock lock(mutex_);
      if (text == last_) return;
      last_ = text;
    }
    log_error("{}", text);
  }

 private:
  Mutex mutex_;
  std::string last_ GUARDED_BY(mutex_);
};

OnceLog once_log;

}  // namespace

int errno_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::io:
    case ErrorCode::corrupt:
      return EIO;
    case ErrorCode::no_space:
      return ENOSPC;
    case ErrorCode::unsupported:
      return EOPNOTSUPP;
    case ErrorCode::invalid:
      return EINVAL;
    case ErrorCode::denied:
      return EACCES;
    case ErrorCode::read_only:
      return EROFS;
    case ErrorCode::not_found:
      return ENOENT;
    case ErrorCode::busy:
      return EBUSY;
    case ErrorCode::would_wait:
      return EAGAIN;
  }
  return EIO;
}

Request::~Request() {
  if (request_ != nullptr) error(EIO);
}

void Request::error(const Error& cause) {
  const auto is = [&](ErrorCode code) { return cause.code() == code; };
  const bool asked_again = is(ErrorCode::would_wait) && NoWait::current();
  if (!is(ErrorCode::invalid) && !is(ErrorCode::read_only) && !asked_again) once_log.error(cause.text());
  error(errno_of(cause.code()));
}

bool Request::opened(uint32_t flags, uint64_t handle, int32_t host_file) {
  fuse_open_out out = {};
  out.open_flags = flags;
  out.fh = handle;
  static_assert(sizeof out == 16);
  std::memcpy(reinterpret_cast<std::byte*>(&out) + 12, &host_file, sizeof host_file);  // once called padding
  const iovec part = {&out, sizeof out};
  return fuse_reply_iov(take(), &part, 1) == 0;
}

}  // namespace imgfuse::fuse
