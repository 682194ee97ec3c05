#include "fuse/operations.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fuse.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <span>
#include <string>

#include "base/buffer.h"
#include "base/math.h"
#include "fuse/connection.h"
#include "fuse/kernel_abi.h"
#include "fuse/request.h"
#include "fuse/ring_entry.h"
#include "fuse/seek.h"
#include "fuse/snapshot_disk.h"

namespace imgfuse::fuse {
namespace {

/// Names and owners never change, sizes and times through the kernel or with a notice to it. st_blocks does otherwise,
/// hence seconds. Names of snapshots come and go.
constexpr double kAttributeTimeout = 1;
constexpr double kNameTimeout = 3600;
/// Requests of read-ahead and asynchronous O_DIRECT that the kernel keeps in flight (its default of 12 is too few
/// for a deep queue), and where it begins to hold back.
constexpr unsigned kMaxBackground = 256;
constexpr unsigned kCongestionThreshold = 192;
constexpr size_t kMaxRead = size_t{1} << 20;

Served& served(fuse_req_t request) { return *static_cast<Served*>(fuse_req_userdata(request)); }

/// A request for a node that is a file. Answers it where there is none.
class FileRequest : public Request {
 public:
  FileRequest(fuse_req_t request, fuse_ino_t number) : Request(request), node_(served(request).tree.find(number)) {
    if (node_ == nullptr)
      error(ENOENT);
    else if (node_->file == nullptr)
      error(EISDIR);
  }
  explicit operator bool() const { return node_ != nullptr && node_->file != nullptr; }
  const Node& node() const { return *node_; }
  RawFile& file() const { return *node_->file; }
  Disk& disk() const { return file().disk(); }

 private:
  const NodeRef node_;
};

/// The part of the range before the end of the disk.
GuestRange clip(const Disk& disk, off_t offset, uint64_t length) {
  const uint64_t size = disk.size();
  const uint64_t begin = std::min(static_cast<uint64_t>(offset), size);
  return {GuestOffset(begin), std::min(length, size - begin)};
}

void init(void* userdata, fuse_conn_info* connection) {
  Served& served = *static_cast<Served*>(userdata);
  const auto want = [&](unsigned capability, bool wanted) {
    connection->want &= ~capability;
    if (wanted) connection->want |= connection->capable & capability;
  };
  want(FUSE_CAP_ASYNC_READ | FUSE_CAP_ASYNC_DIO | FUSE_CAP_PARALLEL_DIROPS, true);
  // Nothing changes behind the kernel's back: without this flag its page cache survives a new mtime.
  want(FUSE_CAP_AUTO_INVAL_DATA, false);
  // open(O_TRUNC) then comes as a change of size, see is_open_truncate().
  want(FUSE_CAP_ATOMIC_O_TRUNC, false);
  // pread and writev are 3 times as fast for large reads.
  want(FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE, false);
  want(FUSE_CAP_WRITEBACK_CACHE, served.options.writeback_cache);
  connection->max_background = kMaxBackground;
  connection->congestion_threshold = kCongestionThreshold;
  served.on_init();
}

void lookup(fuse_req_t raw_request, fuse_ino_t directory, const char* name) {
  Request request(raw_request);
  const Tree& tree = served(raw_request).tree;
  fuse_entry_param entry = {};
  entry.entry_timeout = tree.is_changing(directory) ? 0 : kNameTimeout;
  entry.attr_timeout = kAttributeTimeout;
  if (const NodeRef node = tree.find(directory, name)) {
    entry.ino = node->number;
    entry.attr = tree.attributes(*node);
  }
  request.entry(entry);  // node 0: the kernel remembers that there is nothing
}

void get_attributes(fuse_req_t raw_request, fuse_ino_t number, fuse_file_info*) {
  Request request(raw_request);
  const Tree& tree = served(raw_request).tree;
  const NodeRef node = tree.find(number);
  if (node == nullptr) return request.error(ENOENT);
  request.attributes(tree.attributes(*node), kAttributeTimeout);
}

/// Mode and owner are options of the mount. Setting what is already there is accepted, for programs that copy both.
bool changes_owner(const struct stat& current, const struct stat& wanted, int which) {
  return ((which & FUSE_SET_ATTR_MODE) && (wanted.st_mode & 07777) != (current.st_mode & 07777)) ||
         ((which & FUSE_SET_ATTR_UID) && wanted.st_uid != current.st_uid) ||
         ((which & FUSE_SET_ATTR_GID) && wanted.st_gid != current.st_gid);
}

/// Without a file descriptor, size 0 comes from open(O_TRUNC), which leaves a disk as it is, as with a block device:
/// "dd of=disk.raw" just works. (The kernel's FATTR_OPEN would say so better, but Linux 6.18 does not set it.)
bool is_open_truncate(const struct stat& wanted, const fuse_file_info* info) {
  return wanted.st_size == 0 && info == nullptr;
}

Result<> set_size(RawFile& file, const struct stat& wanted) {
  const auto size = static_cast<uint64_t>(wanted.st_size);
  if (size != file.disk().size()) IMG_TRY(file.disk().resize(size));
  file.touch();
  return {};
}

void set_attributes(fuse_req_t raw_request, fuse_ino_t number, struct stat* wanted, int which, fuse_file_info* info) {
  Request request(raw_request);
  const Tree& tree = served(raw_request).tree;
  const NodeRef node = tree.find(number);
  if (node == nullptr) return request.error(ENOENT);
  if (node->file == nullptr) return request.error(node->text ? EROFS : EPERM);
  if (node->file->read_only()) return request.error(EROFS);
  if (changes_owner(tree.attributes(*node), *wanted, which)) return request.error(EPERM);

  RawFile& file = *node->file;
  if ((which & FUSE_SET_ATTR_SIZE) && !is_open_truncate(*wanted, info))
    if (auto sized = set_size(file, *wanted); !sized) return request.error(sized.error());
  if (which & FUSE_SET_ATTR_MTIME_NOW)
    file.touch();
  else if (which & FUSE_SET_ATTR_MTIME)
    file.set_modified(wanted->st_mtim);
  request.attributes(tree.attributes(*node), kAttributeTimeout);
}

/// The node if it is a text, else null.
NodeRef find_text(fuse_req_t request, fuse_ino_t number) {
  NodeRef node = served(request).tree.find(number);
  return node != nullptr && node->text ? node : nullptr;
}

void open_text(fuse_req_t raw_request, const Node& node, const fuse_file_info& info) {
  Request request(raw_request);
  if ((info.flags & O_ACCMODE) != O_RDONLY) return request.error(EROFS);
  auto text = std::make_unique<std::string>(node.text());
  if (request.opened(FOPEN_DIRECT_IO, reinterpret_cast<uint64_t>(text.get()))) (void)text.release();
}

void read_text(fuse_req_t raw_request, size_t length, off_t offset, const fuse_file_info& info) {
  const auto& text = *reinterpret_cast<const std::string*>(info.fh);
  const size_t begin = std::min(static_cast<size_t>(offset), text.size());
  Request(raw_request).data(std::as_bytes(std::span(text)).subspan(begin, std::min(length, text.size() - begin)));
}

void open(fuse_req_t raw_request, fuse_ino_t number, fuse_file_info* info) {
  if (const NodeRef text = find_text(raw_request, number)) return open_text(raw_request, *text, *info);
  FileRequest request(raw_request, number);
  if (!request) return;
  if ((info->flags & O_ACCMODE) != O_RDONLY && request.file().read_only()) return request.error(EROFS);
  if (SnapshotDisk* snapshot = request.node().snapshot)
    if (auto acquired = snapshot->acquire(); !acquired) return request.error(acquired.error());
  constexpr uint32_t kDirect = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
  const Served& session = served(raw_request);
  session.connection->wait_until_agreed();
  const int32_t host_file = request.file().host_file();
  uint32_t flags = session.options.direct_io ? kDirect : FOPEN_KEEP_CACHE;
  if (host_file != 0) flags = abi::kOpenPassthrough;
  // With O_DIRECT requests are faster than the kernel's own way; the pages are the host file's in any case.
  if (host_file != 0 && (info->flags & O_DIRECT) != 0) flags |= kDirect;
  request.opened(flags, 0, host_file);
}

void release(fuse_req_t raw_request, fuse_ino_t number, fuse_file_info* info) {
  Request request(raw_request);
  const NodeRef node = served(raw_request).tree.find(number);
  if (node && node->text) delete reinterpret_cast<std::string*>(info->fh);
  if (node && node->snapshot) node->snapshot->release();
  request.done();
}

/// Memory for an answer that the calling thread is to make.
Bytes answer_room(size_t length) {
  if (const auto room = RingEntry::room(length)) return *room;
  static thread_local Buffer buffer(kMaxRead);  // memory only where it is touched
  buffer.reserve(length);
  return buffer.bytes().first(length);
}

void read(fuse_req_t raw_request, fuse_ino_t number, size_t length, off_t offset, fuse_file_info* info) {
  if (find_text(raw_request, number)) return read_text(raw_request, length, offset, *info);
  FileRequest request(raw_request, number);
  if (!request) return;
  const GuestRange range = clip(request.disk(), offset, length);
  const Bytes bytes = answer_room(range.length);
  if (auto done = request.disk().read(range.begin, bytes); !done) return request.error(done.error());
  request.data(bytes);
}

/// Writes do not grow the disk: past its end there is no space, as on a block device. What lies before it is written;
/// the kernel makes EIO of a short write with O_DIRECT, so that one gets the error at once.
void write(fuse_req_t raw_request, fuse_ino_t number, const char* data, size_t length, off_t offset,
           fuse_file_info* info) {
  FileRequest request(raw_request, number);
  if (!request) return;
  const GuestRange range = clip(request.disk(), offset, length);
  if (range.empty()) return request.error(ENOSPC);
  const ConstBytes bytes(reinterpret_cast<const std::byte*>(data), range.length);
  if (auto done = request.disk().write(range.begin, bytes); !done) return request.error(done.error());
  request.file().touch();
  if (range.length < length && (info->flags & O_DIRECT)) return request.error(ENOSPC);
  request.written(range.length);
}

void sync(fuse_req_t raw_request, fuse_ino_t number, int, fuse_file_info*) {
  FileRequest request(raw_request, number);
  if (!request) return;
  if (request.file().read_only()) return request.done();
  request.done(request.disk().flush());
}

/// fallocate without a mode: space for the range, and a larger disk where it ends behind the end.
Result<> allocate(Disk& disk, off_t offset, uint64_t length, bool keep_size) {
  const uint64_t end = static_cast<uint64_t>(offset) + length;
  if (end > disk.size() && !keep_size) IMG_TRY(disk.resize(end));
  return disk.populate(clip(disk, offset, length));
}

Result<> change_space(Disk& disk, int mode, off_t offset, uint64_t length) {
  const bool keep_size = (mode & FALLOC_FL_KEEP_SIZE) != 0;
  switch (mode & ~FALLOC_FL_KEEP_SIZE) {
    case 0:
      return allocate(disk, offset, length, keep_size);
    case FALLOC_FL_PUNCH_HOLE:  // always with KEEP_SIZE, says the kernel
      return disk.write_zeroes(clip(disk, offset, length), Zeroing::may_free);
    case FALLOC_FL_ZERO_RANGE: {
      const uint64_t end = static_cast<uint64_t>(offset) + length;
      if (end > disk.size() && !keep_size) IMG_TRY(disk.resize(end));
      return disk.write_zeroes(clip(disk, offset, length), Zeroing::keep_allocation);
    }
    default:
      return fail(ErrorCode::unsupported, "fallocate mode {:#x} is not supported", mode);
  }
}

void change_space(fuse_req_t raw_request, fuse_ino_t number, int mode, off_t offset, off_t length, fuse_file_info*) {
  FileRequest request(raw_request, number);
  if (!request) return;
  if (offset < 0 || length <= 0 || !checked_add(offset, length) || offset + length < 0) return request.error(EFBIG);
  auto done = change_space(request.disk(), mode, offset, static_cast<uint64_t>(length));
  if (done) request.file().touch();
  request.done(done);
}

void seek(fuse_req_t raw_request, fuse_ino_t number, off_t offset, int whence, fuse_file_info*) {
  FileRequest request(raw_request, number);
  if (!request) return;
  if (offset < 0) return request.error(ENXIO);
  const auto found = find_boundary(request.disk(), GuestOffset(static_cast<uint64_t>(offset)),
                                   whence == SEEK_DATA ? Content::data : Content::hole);
  if (!found) return request.error(found.error());
  if (!*found) return request.error(ENXIO);
  request.position(static_cast<off_t>((*found)->bytes()));
}

void read_directory(fuse_req_t raw_request, fuse_ino_t number, size_t size, off_t position, fuse_file_info*) {
  Request request(raw_request);
  const Tree& tree = served(raw_request).tree;
  std::string listing;
  bool full = false;
  // `place` grows from entry to entry and stays with its entry when others come and go.
  const auto add = [&](off_t place, const char* name, NodeNumber node, mode_t mode) {
    if (place <= position || full) return;
    struct stat attributes = {};
    attributes.st_ino = node;
    attributes.st_mode = mode;
    const size_t used = listing.size();
    const size_t length = fuse_add_direntry(raw_request, nullptr, 0, name, nullptr, 0);
    full = used + length > size;
    if (full) return;
    listing.resize(used + length);
    fuse_add_direntry(raw_request, listing.data() + used, length, name, &attributes, place);
  };
  const NodeRef directory = tree.find(number);
  if (directory == nullptr) return request.error(ENOENT);
  add(1, ".", number, S_IFDIR);
  add(2, "..", directory->parent, S_IFDIR);
  for (const NodeRef& node : tree.children(number))
    add(static_cast<off_t>(2 + node->number), node->name.c_str(), node->number,
        node->is_directory() ? S_IFDIR : S_IFREG);
  request.data(std::as_bytes(std::span(listing)));
}

void filesystem_statistics(fuse_req_t raw_request, fuse_ino_t) {
  Request request(raw_request);
  constexpr uint64_t kBlock = 4096;
  uint64_t size = 0;
  uint64_t allocated = 0;
  const Tree& tree = served(raw_request).tree;
  for (NodeNumber number = kRootNode; const NodeRef node = tree.find(number); ++number) {
    if (node->file == nullptr) continue;
    size += node->file->disk().size();
    allocated += node->file->disk().allocated();
  }
  struct statvfs statistics = {};
  statistics.f_bsize = statistics.f_frsize = kBlock;
  statistics.f_blocks = divide_up(size, kBlock);
  statistics.f_bfree = statistics.f_bavail = (size - std::min(size, allocated)) / kBlock;
  statistics.f_namemax = 255;
  request.filesystem(statistics);
}

/// Names are neither made nor removed by others.
template <class... Arguments>
void refuse(fuse_req_t request, Arguments...) {
  Request(request).error(EPERM);
}

}  // namespace

const fuse_lowlevel_ops& operations() {
  // Absent on purpose: flush (close has nothing to do), access (the kernel checks modes), and all of xattr: the kernel
  // would ask for "security.capability" before each buffered write.
  static const fuse_lowlevel_ops table = [] {
    fuse_lowlevel_ops ops = {};
    ops.init = init;
    ops.lookup = lookup;
    ops.getattr = get_attributes;
    ops.setattr = set_attributes;
    ops.open = open;
    ops.release = release;
    ops.read = read;
    ops.write = write;
    ops.fsync = sync;
    ops.fallocate = change_space;
    ops.lseek = seek;
    ops.readdir = read_directory;
    ops.statfs = filesystem_statistics;
    ops.create = refuse;
    ops.mknod = refuse;
    ops.mkdir = refuse;
    ops.unlink = refuse;
    ops.rmdir = refuse;
    ops.symlink = refuse;
    ops.rename = refuse;
    ops.link = refuse;
    return ops;
  }();
  return table;
}

}  // namespace imgfuse::fuse
