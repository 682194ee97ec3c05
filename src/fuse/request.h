// One request of the kernel, which is answered exactly once. The only place that turns errors into errno.
#pragma once

#include <fuse_lowlevel.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <utility>

#include "imgfuse/error.h"
#include "imgfuse/storage.h"

namespace imgfuse::fuse {

int errno_of(ErrorCode code);

/// A request that waits for its answer. Each function below the constructor answers it; a request that is destroyed
/// without an answer gets EIO. Belongs to one thread. An answer may let another process go on at once: release what
/// the request held before.
class Request {
 public:
  explicit Request(fuse_req_t request) : request_(request) {}
  ~Request();
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;

  void error(int errno_value) { fuse_reply_err(take(), errno_value); }
  /// Errors that the caller's errno does not explain also go to the log, once until another one comes.
  void error(const Error& error);
  void done() { error(0); }
  void done(const Result<>& result) { result ? done() : error(result.error()); }

  void entry(const fuse_entry_param& entry) { fuse_reply_entry(take(), &entry); }
  void attributes(const struct stat& attributes, double timeout) { fuse_reply_attr(take(), &attributes, timeout); }
  /// `flags` are the kernel's FOPEN_*, of which libfuse 3.14 does not know all. `handle` comes with each later request
  /// of whoever has opened; `host_file` is for FOPEN_PASSTHROUGH. False: he is gone, there will be none.
  bool opened(uint32_t flags, uint64_t handle = 0, int32_t host_file = 0);
  void data(ConstBytes bytes) { fuse_reply_buf(take(), reinterpret_cast<const char*>(bytes.data()), bytes.size()); }
  void written(size_t length) { fuse_reply_write(take(), length); }
  void position(off_t position) { fuse_reply_lseek(take(), position); }
  void filesystem(const struct statvfs& statistics) { fuse_reply_statfs(take(), &statistics); }

 private:
  fuse_req_t take() { return std::exchange(request_, nullptr); }

  fuse_req_t request_;
};

}  // namespace imgfuse::fuse
