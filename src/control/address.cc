#include "control/address.h"

#include <fmt/format.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string_view>

namespace imgfuse::control {
namespace {

constexpr int kBacklog = 1024;
/// A daemon with a full backlog must not hang its callers.
constexpr timeval kConnectPatience = {5, 0};
constexpr std::string_view kFolder = "imgfuse";
constexpr std::string_view kSuffix = ".sock";
/// A longer path, with folder and name behind it, does not fit into an address.
constexpr size_t kMaxRuntimeLength = sizeof(sockaddr_un::sun_path) - 48;

struct SocketName {
  dev_t device = 0;
  pid_t pid = 0;
};

std::string format_name(const SocketName& name) {
  return fmt::format("{}:{}-{}{}", major(name.device), minor(name.device), name.pid, kSuffix);
}

std::optional<SocketName> parse_name(const std::string& text) {
  unsigned major_number = 0;
  unsigned minor_number = 0;
  SocketName name;
  if (std::sscanf(text.c_str(), "%u:%u-%d", &major_number, &minor_number, &name.pid) != 3) return std::nullopt;
  name.device = makedev(major_number, minor_number);
  if (name.pid <= 0 || format_name(name) != text) return std::nullopt;
  return name;
}

std::optional<sockaddr_un> address_of(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) return std::nullopt;
  std::memcpy(address.sun_path, path.c_str(), path.size());
  return address;
}

const sockaddr* generic(const sockaddr_un& address) { return reinterpret_cast<const sockaddr*>(&address); }

/// Best first. A variable can be another user's, after su(1) for example.
std::vector<std::string> folders() {
  std::vector<std::string> folders;
  const char* const runtime = std::getenv("XDG_RUNTIME_DIR");
  if (runtime != nullptr && runtime[0] == '/' && std::strlen(runtime) < kMaxRuntimeLength)
    folders.push_back(fmt::format("{}/{}", runtime, kFolder));
  if (::geteuid() == 0) folders.push_back(fmt::format("/run/{}", kFolder));
  folders.push_back(fmt::format("/tmp/{}-{}", kFolder, ::geteuid()));
  return folders;
}

Result<> make_folder(const std::string& path) {
  if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST)
    return fail(ErrorCode::io, "make {}: {}", path, strerror(errno));
  struct stat attributes;
  if (::lstat(path.c_str(), &attributes) != 0) return fail(ErrorCode::io, "{}: {}", path, strerror(errno));
  if (!S_ISDIR(attributes.st_mode) || attributes.st_uid != ::geteuid() || (attributes.st_mode & 022) != 0)
    return fail(ErrorCode::denied, "{} is not a directory that only this user can write to", path);
  return {};
}

std::optional<ucred> credentials_of(const UniqueFd& connection) {
  ucred credentials = {};
  socklen_t length = sizeof credentials;
  if (::getsockopt(connection.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) return std::nullopt;
  return credentials;
}

/// Errno says why there is none.
UniqueFd connect(const std::string& path) {
  const auto address = address_of(path);
  UniqueFd socket(address ? ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0) : -1);
  if (!socket) return socket;
  ::setsockopt(socket.get(), SOL_SOCKET, SO_SNDTIMEO, &kConnectPatience, sizeof kConnectPatience);
  if (::connect(socket.get(), generic(*address), sizeof *address) != 0) socket.reset();
  return socket;
}

/// Killed daemons cannot remove theirs.
void remove_abandoned(const std::filesystem::path& folder) {
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    const auto name = parse_name(entry.path().filename());
    if (!name || ::kill(name->pid, 0) == 0 || errno != ESRCH) continue;
    if (!connect(entry.path()) && errno == ECONNREFUSED) std::filesystem::remove(entry.path(), ignored);
  }
}

/// The paths of this device's sockets.
std::vector<std::string> find_paths(dev_t device) {
  std::vector<std::string> paths;
  std::ifstream table("/proc/net/unix");
  for (std::string line; std::getline(table, line);) {
    const size_t at = line.find(" /");
    if (at == std::string::npos) continue;
    const std::filesystem::path path = line.substr(at + 1);
    const auto name = parse_name(path.filename());
    if (!name || name->device != device || !path.parent_path().filename().string().starts_with(kFolder)) continue;
    // Accepted connections are listed with the path of the socket that accepted them.
    if (std::find(paths.begin(), paths.end(), path) == paths.end()) paths.push_back(path);
  }
  return paths;
}

}  // namespace

Result<std::string> own_socket_path(dev_t device) {
  Result<> made;
  for (const std::string& folder : folders())
    if (made = make_folder(folder); made) return folder + "/" + format_name({device, ::getpid()});
  return fail(made.error());
}

Result<UniqueFd> listen_at(const std::string& path) {
  remove_abandoned(std::filesystem::path(path).parent_path());
  const auto address = address_of(path);
  if (!address) return fail(ErrorCode::invalid, "listen at {}: the path is too long for a socket", path);
  UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  (void)::unlink(path.c_str());        // its name is ours alone: an earlier process had the same id
  (void)::fchmod(socket.get(), 0600);  // what bind() makes of it
  if (!socket || ::bind(socket.get(), generic(*address), sizeof *address) != 0 || ::listen(socket.get(), kBacklog) != 0)
    return fail(ErrorCode::io, "listen at {}: {}", path, strerror(errno));
  return socket;
}

std::vector<Peer> connect_to(dev_t device, uid_t user) {
  std::vector<Peer> peers;
  for (const std::string& path : find_paths(device)) {
    UniqueFd socket = connect(path);
    if (!socket) continue;
    const auto daemon = credentials_of(socket);
    if (!daemon || (daemon->uid != user && daemon->uid != 0)) continue;
    if (std::filesystem::path(path).filename() != format_name({device, daemon->pid})) continue;
    peers.push_back({std::move(socket), daemon->pid});
  }
  return peers;
}

std::optional<uid_t> user_of(const UniqueFd& connection) {
  const auto credentials = credentials_of(connection);
  return credentials ? std::optional(credentials->uid) : std::nullopt;
}

}  // namespace imgfuse::control
