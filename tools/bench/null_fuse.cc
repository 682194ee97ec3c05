// The limit of what FUSE can do: a raw file presented in imgfuse's own way (the same session, transports and kernel
// cache policy), but with one pread or pwrite on the file for each request and nothing else.
//
//     null_fuse FILE MOUNTPOINT [-o LIST]      LIST as of "imgfuse mount"; stays in the foreground
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "fuse/mountpoint.h"
#include "fuse/options.h"
#include "fuse/session.h"
#include "imgfuse/disk.h"

namespace imgfuse {
namespace {

constexpr uint32_t kPage = 4096;

tl::unexpected<Error> host_error(std::string_view action) {
  return fail(ErrorCode::io, "{}: {}", action, strerror(errno));
}

/// Guest offset = host offset, no locks, no checks. Threads: any.
class NullDisk final : public Disk {
 public:
  NullDisk(std::string name, int fd, const struct stat& attributes, bool read_only)
      : name_(std::move(name)),
        fd_(fd),
        size_(static_cast<uint64_t>(attributes.st_size)),
        allocated_(static_cast<uint64_t>(attributes.st_blocks) * 512),
        read_only_(read_only) {}
  ~NullDisk() override { ::close(fd_); }

 private:
  DiskInfo do_info() const override {
    return {.name = name_, .format = "raw", .size = size_, .cluster_size = kPage, .read_only = read_only_};
  }
  uint64_t do_size() const override { return size_; }
  uint64_t do_allocated() const override { return allocated_; }
  Result<> do_count_allocated(const std::atomic<bool>&) override { return {}; }

  Result<> do_read(GuestOffset offset, Bytes out) override {
    while (!out.empty()) {
      const ssize_t done = ::pread(fd_, out.data(), out.size(), static_cast<off_t>(offset.bytes()));
      if (done == 0) return fail(ErrorCode::io, "read: {} has become shorter", name_);
      if (done < 0 && errno != EINTR) return host_error("read");
      if (done < 0) continue;
      out = out.subspan(static_cast<size_t>(done));
      offset = offset + static_cast<uint64_t>(done);
    }
    return {};
  }

  Result<> do_write(GuestOffset offset, ConstBytes data) override {
    while (!data.empty()) {
      const ssize_t done = ::pwrite(fd_, data.data(), data.size(), static_cast<off_t>(offset.bytes()));
      if (done < 0 && errno != EINTR) return host_error("write");
      if (done < 0) continue;
      data = data.subspan(static_cast<size_t>(done));
      offset = offset + static_cast<uint64_t>(done);
    }
    return {};
  }

  Result<> do_write_zeroes(GuestRange range, Zeroing zeroing) override {
    const int mode = zeroing == Zeroing::may_free ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;
    const auto begin = static_cast<off_t>(range.begin.bytes());
    if (::fallocate(fd_, mode | FALLOC_FL_KEEP_SIZE, begin, static_cast<off_t>(range.length)) != 0)
      return host_error("fallocate");
    return {};
  }

  Result<> do_populate(GuestRange, Holes) override { return {}; }

  Result<std::vector<Extent>> do_map(GuestRange range, size_t) override {
    const HostOffset host(range.begin.bytes());
    return std::vector<Extent>{
        {.range = range, .kind = ExtentKind::data, .allocated = true, .has_host_offset = true, .host = host}};
  }

  Result<> do_flush() override {
    if (::fdatasync(fd_) != 0) return host_error("fdatasync");
    return {};
  }

  Result<> do_resize(uint64_t, ResizeOptions) override {
    return fail(ErrorCode::unsupported, "the limit's file keeps its size");
  }

  Result<> do_close() override { return read_only_ ? Result<>{} : do_flush(); }

  const std::string name_;
  const int fd_;
  const uint64_t size_, allocated_;
  const bool read_only_;
};

Result<> serve(const std::string& file, const std::string& place, const std::string& list) {
  fuse::MountOptions options;
  options.subtype = "null_fuse";
  IMG_TRY(fuse::parse_options(list, options, [](std::string_view, const std::string&) { return false; }));
  IMG_LET(const std::string path, fuse::canonical_path(file));
  IMG_LET(const fuse::Mountpoint mountpoint, fuse::check_mountpoint(place, path));

  const int fd = ::open(path.c_str(), (options.read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
  struct stat attributes = {};
  if (fd < 0 || ::fstat(fd, &attributes) != 0) return host_error("open " + path);
  NullDisk disk(path, fd, attributes, options.read_only);
  const fuse::Session::Subject subject{path, attributes.st_mtim, attributes.st_dev, attributes.st_ino};
  IMG_LET(const auto session, fuse::Session::mount(disk, subject, mountpoint, options));
  return session->serve({});
}

}  // namespace
}  // namespace imgfuse

int main(int count, char** words) {
  const std::vector<std::string> arguments(words + 1, words + count);
  const bool with_list = arguments.size() == 4 && arguments[2] == "-o";
  if (arguments.size() != 2 && !with_list) {
    (void)std::fputs("Usage: null_fuse FILE MOUNTPOINT [-o LIST]\n", stderr);
    return 2;
  }
  const auto served = imgfuse::serve(arguments[0], arguments[1], with_list ? arguments[3] : "");
  if (!served) (void)std::fprintf(stderr, "null_fuse: %s\n", served.error().text().c_str());
  return served ? 0 : 1;
}
