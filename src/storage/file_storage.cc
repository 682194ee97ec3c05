#include "storage/file_storage.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>

#include "base/buffer.h"
#include "base/math.h"
#include "base/no_wait.h"

namespace imgfuse {
namespace {

/// Shorter zeroing is written: an ordinary write costs less than splitting the host's extents.
constexpr uint64_t kShortZeroing = uint64_t{64} << 10;

bool not_supported(int error_number) {
  return error_number == EOPNOTSUPP || error_number == ENOSYS || error_number == EINVAL;
}

Error open_error(int error_number, const std::string& path, bool writable) {
  switch (error_number) {
    case EISDIR:
      return Error(ErrorCode::invalid, "is a directory, not an image");
    case ENXIO:
      return Error(ErrorCode::invalid, "is neither a regular file nor a block device");
    case EACCES:
    case EPERM:
    case EROFS:
      if (writable && access(path.c_str(), R_OK) == 0)
        return Error(host_error(error_number).code(), host_error(error_number).text() + " to write; --read-only works");
      break;
  }
  return host_error(error_number);
}

/// Counts a change when it is over, whatever came of it.
class Change {
 public:
  explicit Change(std::atomic<uint64_t>& counter) : counter_(counter) {}
  ~Change() { counter_.fetch_add(1, std::memory_order_release); }
  Change(const Change&) = delete;
  Change& operator=(const Change&) = delete;

 private:
  std::atomic<uint64_t>& counter_;
};

}  // namespace

Result<std::shared_ptr<FileStorage>> FileStorage::open(const std::string& path, const FileOptions& options) {
  // Not blocking, and no controlling terminal: the name may be a FIFO or a terminal, which only fstat() tells.
  UniqueFd fd(::open(path.c_str(), (options.writable ? O_RDWR : O_RDONLY) | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
  if (!fd) return fail(open_error(errno, path, options.writable));
  return adopt(std::move(fd), path, options);
}

Result<std::shared_ptr<FileStorage>> FileStorage::adopt(UniqueFd fd, std::string name, const FileOptions& options) {
  struct stat status {};
  if (fstat(fd.get(), &status) != 0) return fail(host_error(errno));
  if (S_ISDIR(status.st_mode)) return fail(open_error(EISDIR, name, false));
  if (!S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode)) return fail(open_error(ENXIO, name, false));
  if (const int flags = fcntl(fd.get(), F_GETFL); flags < 0 || fcntl(fd.get(), F_SETFL, flags & ~O_NONBLOCK) != 0)
    return fail(host_error(errno));
  IMG_TRY(lock_image(fd.get(), name, options.lock));

  // The size is looked at under the lock: before it, a writer might still have changed it.
  const off_t end = lseek(fd.get(), 0, SEEK_END);
  if (end < 0) return fail(host_error(errno, "find the size"));
  int unit = 1;
  if (S_ISBLK(status.st_mode) && ioctl(fd.get(), BLKSSZGET, &unit) != 0) unit = 4096;

  IMG_LET(const FileId id, file_id(fd.get()));
  StorageInfo info{std::move(name), options.writable, S_ISREG(status.st_mode)};
  std::shared_ptr<FileStorage> storage(new FileStorage(std::move(fd), std::move(info), id, options.cache,
                                                       static_cast<uint64_t>(end), static_cast<uint32_t>(unit)));
  if (options.cache == CacheMode::none || options.cache == CacheMode::directsync) {
    IMG_LET(const DirectAlignment alignment, DirectIo::enable(storage->file_));
    storage->direct_.emplace(storage->file_, alignment, storage->blocks_);
  }
  return storage;
}

Result<> FileStorage::read(HostOffset offset, Bytes out) {
  if (!direct_) return file_.read(offset.bytes(), out);
  if (NoWait::current()) return NoWait::current()->miss();  // the page cache has nothing of it
  return direct_->read(offset.bytes(), out);
}

Result<> FileStorage::write(HostOffset offset, std::span<const ConstBytes> parts) {
  Change change(changes_);
  return direct_ ? direct_->write(offset.bytes(), parts) : file_.write(offset.bytes(), parts);
}

/// The whole units inside the range, an empty range if there are none.
HostRange FileStorage::whole_units(HostRange range) const {
  const uint64_t begin = round_up(range.begin.bytes(), unit_);
  const uint64_t end = round_down(range.end().bytes(), unit_);
  return {HostOffset(begin), end > begin ? end - begin : 0};
}

int FileStorage::fallocate(int mode, HostRange range) {
  SharedLock lock(blocks_);
  return file_.try_fallocate(mode, range);
}

Result<> FileStorage::write_zeroes(HostRange range) {
  Change change(changes_);
  if (range.length < kShortZeroing || !can_zero_) return write_zero_bytes(range);

  const HostRange whole = whole_units(range);
  if (const int error = fallocate(FALLOC_FL_ZERO_RANGE, whole)) {
    if (!not_supported(error)) return fail(file_.error(error, "zero", range));
    can_zero_ = false;
    return write_zero_bytes(range);
  }
  IMG_TRY(write_zero_bytes({range.begin, whole.begin - range.begin}));
  return write_zero_bytes({whole.end(), range.end() - whole.end()});
}

Result<> FileStorage::write_zero_bytes(HostRange range) {
  while (!range.empty()) {
    const ConstBytes piece = zeroes(std::min<uint64_t>(range.length, kZeroesSize));
    IMG_TRY(write(range.begin, piece));
    range = {range.begin + piece.size(), range.length - piece.size()};
  }
  return {};
}

Result<> FileStorage::discard(HostRange range) {
  Change change(changes_);
  const uint64_t end = std::min(range.end().bytes(), file_.end());
  if (range.begin.bytes() >= end || !can_punch_) return {};
  const HostRange whole = whole_units({range.begin, end - range.begin.bytes()});
  if (whole.empty()) return {};
  const int error = fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, whole);
  if (error == 0) return {};
  if (!not_supported(error)) return fail(file_.error(error, "punch a hole at", whole));
  can_punch_ = false;
  return {};
}

Result<> FileStorage::allocate(HostRange range) {
  Change change(changes_);
  if (range.empty()) return {};
  const int error = fallocate(0, range);
  if (error == 0) return {};
  if (!not_supported(error)) return fail(file_.error(error, "allocate", range));
  return fill_holes(range);
}

Result<> FileStorage::fill_holes(HostRange range) {
  while (!range.empty()) {
    IMG_LET(const StorageExtent piece, extent(range));
    if (!piece.data) IMG_TRY(write_zero_bytes({range.begin, piece.length}));
    range = {range.begin + piece.length, range.length - piece.length};
  }
  return {};
}

Result<> FileStorage::flush() {
  if (cache_ == CacheMode::unsafe) return {};
  const uint64_t wanted = changes_.load(std::memory_order_acquire);
  Lock lock(flush_mutex_);
  if (flush_error_) return fail(*flush_error_);
  if (flushed_ >= wanted && !shared_) return {};
  // Everything that has returned by now is covered, so those who wait for the mutex find their work done.
  const uint64_t covered = changes_.load(std::memory_order_acquire);
  if (auto result = file_.sync(); !result) {
    flush_error_ = result.error();
    return result;
  }
  flushed_ = covered;
  return {};
}

int FileStorage::share_file() {
  shared_ = true;
  return file_.fd();
}

Result<> FileStorage::resize(uint64_t size) {
  Change change(changes_);
  if (!info_.extensible) return fail(ErrorCode::unsupported, "{} is a block device of fixed size", info_.name);
  ExclusiveLock lock(blocks_);
  return file_.truncate(size);
}

Result<StorageExtent> FileStorage::extent(HostRange range) {
  const off_t begin = static_cast<off_t>(range.begin.bytes());
  if (range.begin.bytes() >= file_.end()) return StorageExtent{range.length, false};

  const off_t data = lseek(file_.fd(), begin, SEEK_DATA);
  if (data < 0 && errno == ENXIO) return StorageExtent{range.length, false};
  if (data < 0) return StorageExtent{range.length, true};  // the file system does not tell
  if (data > begin) return StorageExtent{std::min<uint64_t>(range.length, static_cast<uint64_t>(data - begin)), false};
  const off_t hole = lseek(file_.fd(), begin, SEEK_HOLE);
  if (hole <= begin) return StorageExtent{range.length, true};
  return StorageExtent{std::min<uint64_t>(range.length, static_cast<uint64_t>(hole - begin)), true};
}

Result<uint64_t> FileStorage::allocated() {
  struct stat status {};
  if (fstat(file_.fd(), &status) != 0) return fail(host_error(errno, "stat " + info_.name));
  return static_cast<uint64_t>(status.st_blocks) * 512;
}

}  // namespace imgfuse
