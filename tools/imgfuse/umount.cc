#include <fmt/format.h>
#include <spawn.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <ostream>
#include <string>
#include <vector>

#include "command_line.h"
#include "control/client.h"
#include "control/jobs_json.h"
#include "fuse/mountpoint.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

/// Has fusermount3 unmount, which may do it for the user who mounted.
Result<> run_fusermount(const std::string& path, bool lazy) {
  std::vector<std::string> words = {"fusermount3", "-u", "-q"};
  if (lazy) words.push_back("-z");
  words.insert(words.end(), {"--", path});
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);

  pid_t child = 0;
  if (const int error = ::posix_spawnp(&child, argv[0], nullptr, nullptr, argv.data(), environ); error != 0)
    return fail(ErrorCode::io, "run fusermount3: {}", strerror(error));
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
  if (status == 0) return {};
  if (fuse::find_mount(path)) return fail(ErrorCode::busy, "unmount: in use, or mounted by somebody else");
  return {};  // somebody else was faster
}

Result<> unmount(const std::string& path, bool lazy) {
  if (::umount2(path.c_str(), UMOUNT_NOFOLLOW | (lazy ? MNT_DETACH : 0)) == 0) return {};
  if (errno == EPERM) return run_fusermount(path, lazy);
  if (errno == EBUSY) return fail(ErrorCode::busy, "unmount: in use");
  return fail(ErrorCode::io, "unmount: {}", strerror(errno));
}

/// The loop devices on files of the mount, the usual reason why it is in use.
std::string loop_devices(const std::string& mountpoint) {
  std::string devices;
  std::error_code ignored;
  for (const auto& device : std::filesystem::directory_iterator("/sys/block", ignored)) {
    std::ifstream file(device.path() / "loop/backing_file");
    std::string backing;
    if (!std::getline(file, backing)) continue;
    if (backing != mountpoint && !backing.starts_with(mountpoint + "/")) continue;
    devices += fmt::format(" /dev/{}", device.path().filename().string());
  }
  return devices;
}

std::string busy_hint(const std::string& mountpoint) {
  if (const std::string devices = loop_devices(mountpoint); !devices.empty())
    return fmt::format("unmount what is on{0}, then: losetup -d{0}", devices);
  return fmt::format("\"fuser -vm {}\" lists who uses it; --lazy hides it at once and unmounts when nobody does",
                     mountpoint);
}

int wait_for_daemons(Io& io, const std::string& mountpoint, const fuse::MountEntry& mounted,
                     std::vector<control::Client>& daemons) {
  int status = kSuccess;
  for (control::Client& daemon : daemons) {
    const auto closed = daemon.wait_closed();
    if (closed) continue;
    print_error(io, mounted.source, closed.error());
    status = kFailure;
  }
  if (daemons.empty()) print_warning(io, mountpoint, "unmounted; its daemon was gone already, or could not be found");
  return status;
}

/// Asks whoever sits before the terminal whether running jobs are to be cancelled.
bool may_cancel(Io& io, const JobStatus& job) {
  if (!isatty(STDIN_FILENO) || !isatty(STDERR_FILENO)) return false;
  io.err << fmt::format("job {}, a {} to {}, is running. Cancel it and unmount? [y/N] ", job.id, job.kind,
                        printable(job.target))
         << std::flush;
  std::string answer;
  return std::getline(std::cin, answer) && (answer == "y" || answer == "yes");
}

/// A daemon that does not answer, or knows no jobs, is not asked again.
Result<> check_jobs(Io& io, const fuse::MountEntry& mounted) {
  for (control::Client& daemon : control::Client::connect(mounted.device, mounted.user)) {
    const auto list = daemon.call("jobs", control::Json::object(), std::chrono::seconds(5));
    if (!list) continue;
    for (const control::Json& json : *list) {
      const JobStatus job = control::job_from_json(json);
      if (!is_over(job.state) && !may_cancel(io, job))
        return fail(ErrorCode::busy, "job {}, a {} to {}, is running", job.id, job.kind, job.target);
    }
  }
  return {};
}

int umount(Io& io, const std::string& mountpoint, bool lazy, bool force) {
  const auto failed = [&](const Error& error, std::string_view hint = {}) {
    print_error(io, mountpoint, error, hint);
    return kFailure;
  };
  const auto path = fuse::canonical_path(mountpoint);
  if (!path) return failed(path.error());
  const auto mounted = fuse::find_mount(*path);
  if (!mounted) return failed(Error(ErrorCode::not_found, "nothing is mounted here"));
  if (!force)
    if (auto idle = check_jobs(io, *mounted); !idle)
      return failed(idle.error(), "--force cancels it; \"imgfuse jobs\" says how far it is");
  auto daemons = control::Client::connect(mounted->device, mounted->user);
  if (mounted->type != "fuse.imgfuse" && (daemons.empty() || !fuse::is_fuse(*mounted)))
    return failed(Error(ErrorCode::invalid, fmt::format("not an imgfuse mount but {}", mounted->type)));

  if (auto unmounted = unmount(*path, lazy); !unmounted)
    return failed(unmounted.error(), unmounted.error().code() == ErrorCode::busy ? busy_hint(*path) : "");
  return lazy ? kSuccess : wait_for_daemons(io, mountpoint, *mounted, daemons);
}

}  // namespace

int run_umount(Io& io, Arguments args) {
  std::string mountpoint;
  bool lazy = false;
  bool force = false;
  CommandLine line(
      "Unmounts, and returns when the image is closed and its daemon gone. Exit status 1 if closing failed.",
      "imgfuse umount");
  line.text("MOUNTPOINT", mountpoint, "As given to imgfuse mount").required();
  line.flag("-z,--lazy", lazy, "Hide the mount at once, even in use, and do not wait for the daemon");
  line.flag("-f,--force", force, "Cancel the jobs that run, without asking");
  if (const auto status = line.parse(io, args)) return *status;
  return umount(io, mountpoint, lazy, force);
}

}  // namespace imgfuse::tool
