// The first request and its answer, INIT: what libfuse does not know of it.
#pragma once

#include <sys/uio.h>

#include "imgfuse/storage.h"

namespace imgfuse::fuse {

/// What may be agreed upon beyond libfuse's own.
struct Extras {
  bool rings = false;        ///< FUSE over io_uring (Linux 6.14)
  bool passthrough = false;  ///< the kernel reads and writes host files by itself (Linux 6.9)
};

/// Looks at what the kernel offers and adds to the answer what is wanted of it. One thread, which answers INIT; what
/// was agreed upon may be asked for by any thread that answers a later request.
class Handshake {
 public:
  void want(Extras wanted) { wanted_ = wanted; }
  /// Every request that comes by /dev/fuse, of which the first is INIT.
  void look_at(ConstBytes request);
  /// Every answer that goes there, before it is sent. True of the one to INIT.
  bool complete(const iovec* parts, int count);
  Extras agreed() const { return agreed_; }

 private:
  Extras wanted_, agreed_;
  bool looked_ = false, waiting_ = false;
};

}  // namespace imgfuse::fuse
