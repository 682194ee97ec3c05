#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <ostream>
#include <string>
#include <vector>

#include "command_line.h"
#include "fuse/background.h"
#include "fuse/mountpoint.h"
#include "fuse/options.h"
#include "fuse/session.h"
#include "imgfuse/jobs.h"
#include "imgfuse/open.h"
#include "job_target.h"
#include "mounted_chain.h"
#include "overlay.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

/// What a command line asks for.
struct MountRequest {
  std::string image;
  std::string mountpoint;
  OpenOptions open;
  fuse::MountOptions mount;
  std::optional<std::string> overlay;  ///< of the image, which does not change; empty: one without a name
  DetectZeroes detect_zeroes = DetectZeroes::off;
  bool foreground = false;
  bool fake = false;    ///< mount(8)'s -f: check everything, mount nothing
  bool sloppy = false;  ///< mount(8)'s -s: skip unknown options
};

Result<uint64_t> parse_cache_size(std::string_view text) {
  constexpr uint64_t kSmallest = 256_KiB;
  IMG_LET(const uint64_t size, parse_size(text));
  if (size < kSmallest) return fail(ErrorCode::invalid, "a metadata cache of {} is smaller than 256k", text);
  return size;
}

Result<DetectZeroes> parse_detect_zeroes(std::string_view name) {
  if (name == "off") return DetectZeroes::off;
  if (name == "on") return DetectZeroes::on;
  if (name == "unmap") return DetectZeroes::unmap;
  return fail(ErrorCode::invalid, "detect_zeroes={} is none of off, on, unmap", name);
}

/// The image's options in the -o list: fstab has no other place for them.
Result<bool> take_image_option(OpenOptions& open, std::string_view key, const std::string& value) {
  if (key == "force_share") {
    open.force_share = true;
    return true;
  }
  if (key == "copy_on_read" || key == "allow_storage_command") {
    (key == "copy_on_read" ? open.copy_on_read : open.allow_storage_command) = true;
    return true;
  }
  if (key == "prefetch") {
    open.prefetch = 0;
    if (!value.empty()) {
      IMG_LET(open.prefetch, parse_size(value));
    }
    return true;
  }
  static constexpr std::array<std::string_view, 10> kWithValue = {
      "format",         "backing_format", "data_format",      "allow_path", "cache",
      "metadata_cache", "compress",       "compressed_cache", "snapshot",   "data_file"};
  if (std::find(kWithValue.begin(), kWithValue.end(), key) == kWithValue.end()) return false;
  if (value.empty()) return fail(ErrorCode::invalid, "option -o {} needs a value", key);
  if (key == "format") open.format = value;
  if (key == "backing_format") open.backing_format = value;
  if (key == "data_format") open.data_format = value;
  if (key == "snapshot") open.snapshot = value;
  if (key == "data_file") open.data_file = value;
  if (key == "allow_path") open.allowed_directories.push_back(value);
  if (key == "compress") open.compress = value;
  if (key == "cache") {
    IMG_LET(open.cache, parse_cache_mode(value));
  }
  if (key == "compressed_cache") {
    IMG_LET(open.compressed_cache, parse_size(value));
  }
  if (key == "metadata_cache") {
    IMG_LET(open.metadata_cache, parse_cache_size(value));
  }
  return true;
}

/// What is for the disk as it is mounted, whatever image it lies in.
Result<bool> take_disk_option(MountRequest& request, std::string_view key, const std::string& value) {
  if (key == "ephemeral") {
    request.overlay = "";
    return true;
  }
  if (key != "overlay" && key != "detect_zeroes") return false;
  if (value.empty()) return fail(ErrorCode::invalid, "option -o {} needs a value", key);
  if (key == "overlay") request.overlay = value;
  if (key == "detect_zeroes") {
    IMG_LET(request.detect_zeroes, parse_detect_zeroes(value));
  }
  return true;
}

Result<> take_option_list(MountRequest& request, std::string_view list) {
  return fuse::parse_options(list, request.mount, [&](std::string_view key, const std::string& value) -> Result<bool> {
    IMG_LET(const bool taken, take_image_option(request.open, key, value));
    IMG_LET(const bool of_disk, take_disk_option(request, key, value));
    return taken || of_disk || request.sloppy;
  });
}

Result<> check_options(const MountRequest& request) {
  if (request.open.force_share && !request.mount.read_only && !request.open.snapshot)
    return fail(ErrorCode::invalid, "--force-share takes no locks and needs --read-only");
  const bool writes_elsewhere = request.open.snapshot || request.open.compress || request.open.data_file;
  if (request.overlay && (request.mount.read_only || writes_elsewhere))
    return fail(ErrorCode::invalid, "overlay= and ephemeral exclude ro, snapshot=, compress= and data_file=");
  if (request.open.compress && *request.open.compress != "zlib" && *request.open.compress != "zstd")
    return fail(ErrorCode::invalid, "compress={} is neither zlib nor zstd", *request.open.compress);
  if ((request.open.copy_on_read || request.open.prefetch) && (request.mount.read_only || request.open.snapshot))
    return fail(ErrorCode::invalid, "copy_on_read and prefetch write to the image, which is to be opened read-only");
  return {};
}

/// Root may do what it wants; for others fusermount3 would refuse in words of its own.
Result<> check_allow_other(const fuse::MountOptions& options) {
  if ((!options.allow_other && !options.allow_root) || ::geteuid() == 0) return {};
  std::ifstream config("/etc/fuse.conf");
  for (std::string line; std::getline(config, line);)
    if (line.starts_with("user_allow_other")) return {};
  return fail(ErrorCode::denied, "option {} is only for root until /etc/fuse.conf has a line \"user_allow_other\"",
              options.allow_other ? "allow_other" : "allow_root");
}

/// fusermount3 looks at the mount as root to see whether the daemon is gone, and is not let in.
void warn_of_auto_unmount(Io& io, const MountRequest& request) {
  const fuse::MountOptions& mount = request.mount;
  if (mount.auto_unmount && !mount.allow_other && !mount.allow_root && ::geteuid() != 0)
    print_warning(io, request.image, "auto_unmount works for users only together with allow_other or allow_root");
}

/// A daemon leaves its directory. Symbolic links stay: backing files are relative to the name that was given.
void make_absolute(MountRequest& request) {
  for (std::string& directory : request.open.allowed_directories) directory = std::filesystem::absolute(directory);
  if (request.overlay && !request.overlay->empty()) request.overlay = std::filesystem::absolute(*request.overlay);
}

Result<fuse::Session::Subject> find_image(const std::string& path) {
  struct stat attributes;
  if (::stat(path.c_str(), &attributes) != 0)
    return fail(errno == EACCES ? ErrorCode::denied : ErrorCode::not_found, "open: {}", strerror(errno));
  return fuse::Session::Subject{std::filesystem::absolute(path), attributes.st_mtim, attributes.st_dev,
                                attributes.st_ino};
}

Result<fuse::Mountpoint> find_mountpoint(const MountRequest& request) {
  IMG_LET(const std::string image, fuse::canonical_path(request.image));
  return fuse::check_mountpoint(request.mountpoint, image);
}

Result<Overlay> open_image(const MountRequest& request, const std::string& image, const OpenOptions& options) {
  if (request.overlay) return open_overlay(image, *request.overlay, options);
  IMG_LET(auto disk, open_disk(image, options));
  return Overlay{std::move(disk), options, image};
}

/// Opens, mounts and serves. Everything that can be wrong with the request is found before `background` is ready.
int serve(Io& io, const MountRequest& request, fuse::Background& background) {
  const auto failed = [&](const Error& error) {
    print_error(io, request.image, error);
    return kFailure;
  };
  auto subject = find_image(request.image);
  if (!subject) return failed(subject.error());
  const auto mountpoint = find_mountpoint(request);
  if (!mountpoint) return failed(mountpoint.error());
  if (auto allowed = check_allow_other(request.mount); !allowed) return failed(allowed.error());

  warn_of_auto_unmount(io, request);

  OpenOptions open = request.open;
  open.read_only = request.mount.read_only || open.snapshot;
  open.copy_in_background = true;
  // What is for requests is not for what jobs do beside them.
  open.cache = without_write_through(open.cache);
  auto opened = open_image(request, subject->image, open);
  if (!opened) return failed(opened.error());
  if (request.fake) {
    const auto closed = opened->disk->close();
    return closed ? kSuccess : failed(closed.error());
  }
  if (request.overlay && request.overlay->empty()) subject->ephemeral = opened->disk->info().name;
  auto chain = mounted_chain(opened->options, opened->disk->info().name, opened->path);
  const auto disk = with_jobs(std::move(opened->disk), target_opener(open, subject->image, mountpoint->path), chain);
  if (open.cache != request.open.cache) disk->set_write_through();
  disk->set_detect_zeroes(request.detect_zeroes);
  auto session = fuse::Session::mount(*disk, *subject, *mountpoint, request.mount);
  if (!session) {
    const int status = failed(session.error());
    if (auto closed = disk->close(); !closed) failed(closed.error());
    return status;
  }
  return (*session)->serve([&] { background.ready(); }) ? kSuccess : kFailure;  // it has logged the error
}

int mount(Io& io, MountRequest& request) {
  make_absolute(request);
  fuse::Background background;
  if (!request.foreground) {
    io.out.flush();
    io.err.flush();
    if (const auto status = background.fork()) return *status;
  }
  return serve(io, request, background);
}

void add_mount_options(CommandLine& line, MountRequest& request, std::vector<std::string>& lists) {
  line.text("IMAGE", request.image, "A qcow2, qed, fvd or raw image").required();
  line.text("MOUNTPOINT", request.mountpoint, "A file that becomes the disk, or a directory that shows disk.raw")
      .required();
  line.flag("-f,--foreground", request.foreground, "Stay in the foreground; the exit status tells how closing went");
  line.texts("-o", lists, "Options as in fstab, see below", "LIST");
  line.flag("-r,--read-only", request.mount.read_only, "Change nothing");
  line.flag("-s", request.mount.single_threaded, "Answer one request at a time");
  line.flag("-d,--debug", request.mount.debug, "Show every request; implies -f");
  add_open_options(line, request.open, FormatFlag::long_only);
  line.text("--data-file", request.open.data_file, "The image's external data file, whatever the image calls it",
            "FILE");
  line.word("--cache", request.open.cache, parse_cache_mode,
            "How the image is accessed: writeback (default), none, writethrough, directsync or unsafe", "MODE");
  line.flag("--allow-storage-command", request.open.allow_storage_command,
            "Let an FVD image run its own command when its device is full");
  line.word("--metadata-cache", request.open.metadata_cache, parse_cache_size,
            "Memory for the image's tables (default 32M)", "SIZE");
  line.size("--compressed-cache", request.open.compressed_cache,
            "Memory for decompressed clusters (default 16M, 0: none)");
}

constexpr const char* kFooter =
    "Options for -o: ro rw allow_other allow_root uid=N gid=N umask=OCTAL max_threads=N clone_fd\n"
    "  io_uring=auto|on|off fsname=NAME subtype=NAME auto_unmount sync direct_io writeback_cache passthrough,\n"
    "  and for the image\n"
    "  format= backing_format= data_format= cache= metadata_cache= allow_path= force_share\n"
    "  compress= compressed_cache= snapshot= data_file= copy_on_read prefetch[=BYTES/S] allow_storage_command\n"
    "  detect_zeroes= overlay= ephemeral.\n"
    "\n"
    "Without umask= only the owner (uid=) has access to the disk, and root where allow_other lets it in.";

}  // namespace

int run_mount(Io& io, Arguments args) {
  MountRequest request;
  std::vector<std::string> lists;
  CommandLine line("Presents an image as a raw file.", "imgfuse mount");
  line.footer(kFooter);
  line.version("imgfuse " IMGFUSE_VERSION);
  add_mount_options(line, request, lists);
  if (const auto status = line.parse(io, args)) return *status;
  const bool read_only = request.mount.read_only;
  for (const std::string& list : lists)
    if (auto taken = take_option_list(request, list); !taken) return line.usage_error(io, taken.error());
  if (read_only) request.mount.read_only = true;  // -r wins over -o rw
  if (auto good = check_options(request); !good) return line.usage_error(io, good.error());
  if (request.mount.debug) request.foreground = true;
  return mount(io, request);
}

int run_mount_helper(Io& io, Arguments args) {
  MountRequest request;
  std::vector<std::string> lists;
  std::string ignored;
  bool ignored_flag = false;
  CommandLine line("Called by mount(8) for type imgfuse.", "mount.imgfuse");
  line.text("SPEC", request.image).required();
  line.text("DIR", request.mountpoint).required();
  line.flag("-s", request.sloppy);
  line.flag("-f", request.fake);
  line.flag("-n,-v", ignored_flag);
  line.flag("-r", request.mount.read_only);
  line.flag("-w", ignored_flag);
  line.texts("-o", lists);
  line.text("-t", ignored);
  line.text("-N", ignored);
  if (const auto status = line.parse(io, args)) return *status;
  const auto usage_error = [&](const Error& error) {
    print_error(io, "", error, "\"imgfuse mount --help\" lists what -o takes");
    return kUsage;
  };
  for (const std::string& list : lists)
    if (auto taken = take_option_list(request, list); !taken) return usage_error(taken.error());
  if (auto good = check_options(request); !good) return usage_error(good.error());
  return mount(io, request);
}

}  // namespace imgfuse::tool
