#include "storage/host_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cerrno>
#include <climits>
#include <cstring>

#include "base/no_wait.h"

namespace imgfuse {
namespace {

ErrorCode code_of(int error_number) {
  switch (error_number) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return ErrorCode::no_space;
    case EACCES:
    case EPERM:
      return ErrorCode::denied;
    case EROFS:
      return ErrorCode::read_only;
    case ENOENT:
    case ENOTDIR:
      return ErrorCode::not_found;
    default:
      return ErrorCode::io;
  }
}

std::string words(int error_number) {
  switch (error_number) {
    case ENOENT:
      return "no such file";
    case EACCES:
      return "permission denied";
    case EROFS:
      return "the file system is mounted read-only";
    default: {
      char text[128];
      return strerror_r(error_number, text, sizeof text);
    }
  }
}

/// Walks over the parts of a write in steps of one system call each.
class PartCursor {
 public:
  explicit PartCursor(std::span<const ConstBytes> parts) : parts_(parts) { skip(0); }

  bool done() const { return parts_.empty(); }
  /// The bytes of all that is left.
  uint64_t left() const {
    uint64_t sum = 0;
    for (const ConstBytes& part : parts_) sum += part.size();
    return sum - used_;
  }
  /// What one system call can take.
  std::span<const iovec> next() {
    size_t count = 0;
    size_t skipped = used_;
    for (const ConstBytes& part : parts_.first(std::min(parts_.size(), vectors_.size()))) {
      // writev takes pointers to mutable bytes for historical reasons only.
      vectors_[count++] = {const_cast<std::byte*>(part.data() + skipped), part.size() - skipped};
      skipped = 0;
    }
    return {vectors_.data(), count};
  }
  void skip(size_t bytes) {
    used_ += bytes;
    while (!parts_.empty() && used_ >= parts_.front().size()) {
      used_ -= parts_.front().size();
      parts_ = parts_.subspan(1);
    }
  }

 private:
  std::span<const ConstBytes> parts_;
  size_t used_ = 0;  // of the first part
  std::array<iovec, IOV_MAX> vectors_;
};

}  // namespace

Error host_error(int error_number) { return Error(code_of(error_number), words(error_number)); }

Error host_error(int error_number, std::string_view action) { return host_error(error_number).during("{}", action); }

Result<FileId> file_id(int fd) {
  struct stat status {};
  if (fstat(fd, &status) != 0) return fail(host_error(errno));
  if (S_ISBLK(status.st_mode)) return FileId{status.st_rdev, 0};
  return FileId{status.st_dev, status.st_ino};
}

Error HostFile::error(int error_number, std::string_view verb, HostRange range) const {
  return host_error(error_number, fmt::format("{} {:#x}+{:#x} of {}", verb, range.begin.bytes(), range.length, name_));
}

void HostFile::grow(uint64_t end) {
  uint64_t known = end_.load(std::memory_order_relaxed);
  while (known < end && !end_.compare_exchange_weak(known, end, std::memory_order_release)) {
  }
}

HostFile::~HostFile() {
  const int scattered = scattered_fd_;
  if (scattered >= 0 && scattered != fd()) ::close(scattered);
}

int HostFile::scattered_fd() {
  if (const int known = scattered_fd_.load(std::memory_order_acquire); known >= 0) return known;
  UniqueFd second(open(fmt::format("/proc/self/fd/{}", fd()).c_str(), O_RDONLY | O_CLOEXEC));
  const bool advised = second && posix_fadvise(second.get(), 0, 0, POSIX_FADV_RANDOM) == 0;
  int none = -1;
  const int wanted = advised ? second.get() : fd();
  if (!scattered_fd_.compare_exchange_strong(none, wanted)) return none;  // another thread was faster
  if (advised) (void)second.release();
  return wanted;
}

/// The host reads ahead when it finds neighbours in memory, some MiB perhaps: of a file that is read all over the place
/// it does so the more often, the more of it is there.
void HostFile::note_miss(uint64_t offset, size_t length) {
  const int wanted = misses_.note(offset, length) ? scattered_fd() : fd();
  if (small_reads_fd_.load(std::memory_order_relaxed) != wanted) small_reads_fd_ = wanted;
}

/// pread(2) that fails with EAGAIN if the thread does not want to wait. Small reads that have to are noted.
ssize_t HostFile::read_some(int from, uint64_t offset, Bytes out) {
  const auto at = static_cast<off_t>(offset);
  const bool small = is_small(out.size());
  NoWait* const hurried = is_direct() ? nullptr : NoWait::current();
  if ((small || hurried) && knows_absent_.load(std::memory_order_relaxed)) {
    const iovec part = {out.data(), out.size()};
    reads_.add();
    const ssize_t n = preadv2(from, &part, 1, at, RWF_NOWAIT);
    if (n > 0 || (n == 0 && offset >= end())) return n;
    const int cause = n < 0 ? errno : EAGAIN;  // Linux 5.9 and 5.10 say 0 for it
    if (cause == EOPNOTSUPP) knows_absent_ = false;
    if (cause == EAGAIN && small) note_miss(offset, out.size());
    if (cause == EAGAIN && hurried) {
      errno = cause;
      return -1;
    }
  }
  if (hurried) hurried->note_blind_read();
  reads_.add();
  return pread(from, out.data(), out.size(), at);
}

Result<> HostFile::read(uint64_t offset, Bytes out) {
  const HostRange range{HostOffset(offset), out.size()};
  while (!out.empty()) {
    const int from = is_small(out.size()) ? small_reads_fd_.load(std::memory_order_relaxed) : fd();
    const ssize_t n = read_some(from, offset, out);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN && NoWait::current())
      return NoWait::current()->miss(from, offset, std::min(out.size(), end() - offset));
    if (n < 0) return fail(error(errno, "read", range));
    const size_t got = static_cast<size_t>(n);
    out = out.subspan(got);
    offset += got;
    if (got == 0 || got % block_ != 0 || offset >= end()) break;
  }
  std::fill(out.begin(), out.end(), std::byte{0});
  return {};
}

Result<> HostFile::write(uint64_t offset, std::span<const ConstBytes> parts) {
  PartCursor cursor(parts);
  while (!cursor.done()) {
    const std::span<const iovec> vectors = cursor.next();
    writes_.add();
    const ssize_t n = pwritev(fd_.get(), vectors.data(), static_cast<int>(vectors.size()), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    // A write of some bytes that writes none would be tried for ever.
    if (n <= 0) return fail(error(n < 0 ? errno : EIO, "write", {HostOffset(offset), cursor.left()}));
    cursor.skip(static_cast<size_t>(n));
    offset += static_cast<uint64_t>(n);
    grow(offset);
  }
  return {};
}

int HostFile::try_fallocate(int mode, HostRange range) {
  for (;;) {
    writes_.add();
    if (fallocate(fd_.get(), mode, static_cast<off_t>(range.begin.bytes()), static_cast<off_t>(range.length)) == 0)
      break;
    if (errno != EINTR) return errno;
  }
  if (!(mode & FALLOC_FL_KEEP_SIZE)) grow(range.end().bytes());
  return 0;
}

Result<> HostFile::sync() {
  flushes_.add();
  if (fdatasync(fd_.get()) != 0) return fail(host_error(errno, "flush " + name_));
  return {};
}

Result<> HostFile::truncate(uint64_t size) {
  if (ftruncate(fd_.get(), static_cast<off_t>(size)) != 0)
    return fail(host_error(errno, fmt::format("resize {} to {:#x}", name_, size)));
  end_.store(size, std::memory_order_release);
  return {};
}

bool HostFile::set_direct(bool on) {
  const int flags = fcntl(fd_.get(), F_GETFL);
  return flags >= 0 && fcntl(fd_.get(), F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
}

}  // namespace imgfuse
