#include "target.h"

#include <sys/stat.h>
#include <unistd.h>

#include "control/commands.h"
#include "fuse/mountpoint.h"

namespace imgfuse::tool {
namespace {

using control::Client;

/// A daemon that is asked what it serves may be stopped, or busy with something else.
constexpr std::chrono::seconds kPatience(5);

/// The daemon of what is mounted at the path, if it is an imgfuse mount.
Result<std::optional<Client>> daemon_at(const std::string& path) {
  const auto canonical = fuse::canonical_path(path);
  const auto mounted = canonical ? fuse::find_mount(*canonical) : std::nullopt;
  if (!mounted || !fuse::is_fuse(*mounted)) return std::nullopt;
  auto daemons = Client::connect(mounted->device, mounted->user);
  if (!daemons.empty()) return std::move(daemons.back());
  if (mounted->type != "fuse.imgfuse") return std::nullopt;
  return fail(ErrorCode::busy, "the daemon of this mount is gone, or another user's");
}

bool holds(Client& daemon, const struct stat& image) {
  const auto info = daemon.call("info", control::Json::object(), kPatience);
  return info && info->value("image-device", uint64_t{0}) == image.st_dev &&
         info->value("image-inode", uint64_t{0}) == image.st_ino;
}

/// The daemon of this user that has the image open.
std::optional<Client> daemon_of(const std::string& path) {
  struct stat image;
  if (::stat(path.c_str(), &image) != 0) return std::nullopt;
  for (const fuse::MountEntry& mounted : fuse::mount_table()) {
    if (!fuse::is_fuse(mounted)) continue;
    for (Client& daemon : Client::connect(mounted.device, ::geteuid()))
      if (holds(daemon, image)) return std::move(daemon);
  }
  return std::nullopt;
}

}  // namespace

Result<Client> connect_to_daemon(const std::string& path) {
  IMG_LET(auto mounted, daemon_at(path));
  if (!mounted) mounted = daemon_of(path);
  if (mounted) return std::move(*mounted);
  return fail(ErrorCode::not_found, "not mounted by this user: neither a mount point nor an image that is in use");
}

Result<Target> Target::open(const std::string& path, const OpenOptions& options) {
  IMG_LET(auto mounted, daemon_at(path));
  if (mounted) return Target(std::move(*mounted));
  auto disk = open_disk(path, options);
  if (disk) return Target(std::move(*disk));
  if (disk.error().code() == ErrorCode::busy)
    if (auto daemon = daemon_of(path)) return Target(std::move(*daemon));
  return fail(disk.error());
}

/// Who leaves without close() has an error to tell already.
Target::~Target() { (void)close(); }

Result<control::Json> Target::run(const std::string& command, const control::Json& arguments) {
  if (auto* daemon = std::get_if<Client>(&where_)) return daemon->call(command, arguments);
  control::Presenter nobody;
  return control::Commands(*std::get<1>(where_), nobody).run({command, arguments, {}});
}

Result<> Target::close() {
  auto* const opened = std::get_if<std::unique_ptr<Disk>>(&where_);
  if (opened == nullptr || *opened == nullptr) return {};
  const std::unique_ptr<Disk> disk = std::move(*opened);
  return disk->close();
}

}  // namespace imgfuse::tool
