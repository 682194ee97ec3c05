#include "fuse/raw_file.h"

#include <ctime>

namespace imgfuse::fuse {
namespace {

constexpr int64_t kSecond = 1'000'000'000;

int64_t to_nanoseconds(timespec time) { return time.tv_sec * kSecond + time.tv_nsec; }

timespec to_timespec(int64_t nanoseconds) {
  int64_t seconds = nanoseconds / kSecond;
  if (nanoseconds % kSecond < 0) --seconds;
  return {seconds, nanoseconds - seconds * kSecond};
}

}  // namespace

RawFile::RawFile(Disk& disk, const FileOwner& owner, timespec modified)
    : disk_(disk),
      owner_(owner),
      read_only_(disk.info().read_only),
      cluster_size_(disk.info().cluster_size),
      modified_(to_nanoseconds(modified)) {}

struct stat RawFile::attributes() const {
  struct stat attributes = {};
  attributes.st_mode = S_IFREG | owner_.mode;
  attributes.st_nlink = 1;
  attributes.st_uid = owner_.uid;
  attributes.st_gid = owner_.gid;
  attributes.st_size = static_cast<off_t>(disk_.size());
  attributes.st_blksize = cluster_size_;
  attributes.st_blocks = static_cast<blkcnt_t>(disk_.allocated() / 512);
  attributes.st_mtim = to_timespec(modified_.load(std::memory_order_relaxed));
  attributes.st_atim = attributes.st_ctim = attributes.st_mtim;
  return attributes;
}

void RawFile::touch() {
  timespec now;
  clock_gettime(CLOCK_REALTIME_COARSE, &now);
  set_modified(now);
}

void RawFile::set_modified(timespec time) { modified_.store(to_nanoseconds(time), std::memory_order_relaxed); }

}  // namespace imgfuse::fuse
