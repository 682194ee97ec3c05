#include "fuse/disk_waits.h"

#include <linux/fuse.h>
#include <sys/resource.h>

namespace imgfuse::fuse {
namespace {

/// So many READs are watched after one of a file whose host cannot tell what is in memory.
constexpr unsigned kManyReads = 1000;

}  // namespace

bool DiskWaits::expects(const RingEntry& entry) {
  switch (entry.opcode()) {
    case FUSE_READ:
      if (!blind()) return false;
      [[fallthrough]];
    case FUSE_WRITE:
      if (slow_ == 0) return false;
      --slow_;
      return true;
    case FUSE_FSYNC:
    case FUSE_FALLOCATE:
    case FUSE_SETATTR:
    case FUSE_LSEEK:
    case FUSE_OPEN:
    case FUSE_RELEASE:
      return true;
    default:
      return false;
  }
}

void DiskWaits::note(const NoWait& hurry) {
  if (hurry.may_have_waited())
    blind_ = kManyReads;
  else if (blind_ > 0)
    --blind_;
}

/// How often the calling thread has given its CPU away since it waited for something.
long DiskWaits::times_slept() {
  rusage usage = {};
  ::getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_nvcsw;
}

}  // namespace imgfuse::fuse
