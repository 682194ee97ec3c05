#include "fuse/session.h"

#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <thread>

#include "base/log.h"
#include "fuse/operations.h"
#include "fuse/own_mount.h"

namespace imgfuse::fuse {
namespace {

/// Sent to the looping thread, so that it looks whether it is to end. Ignored by default: a stray one does no harm.
constexpr int kWakeSignal = SIGURG;

constexpr const char* kDiskName = "disk.raw";

/// What libfuse says while this thread mounts goes into the error; at other times it goes to the log.
thread_local std::string* mount_messages = nullptr;

void take_libfuse_message(fuse_log_level level, const char* format, va_list arguments) {
  std::array<char, 1024> text;
  std::vsnprintf(text.data(), text.size(), format, arguments);
  if (level == FUSE_LOG_DEBUG) {
    (void)std::fputs(text.data(), stderr);
    return;
  }
  std::string_view line = text.data();
  if (line.ends_with('\n')) line.remove_suffix(1);
  if (mount_messages != nullptr)
    mount_messages->append(mount_messages->empty() ? "" : "; ").append(line);
  else
    log_warning("{}", line);
}

FileOwner owner_of(const MountOptions& options, bool read_only) {
  FileOwner owner;
  owner.uid = options.uid.value_or(::geteuid());
  owner.gid = options.gid.value_or(::getegid());
  owner.mode = options.umask ? 0666 & ~*options.umask : 0600;
  if (read_only) owner.mode &= ~static_cast<mode_t>(0222);
  return owner;
}

Tree tree_of(RawFile& file, MountpointKind kind, timespec modified) {
  if (kind == MountpointKind::file) return Tree::of_file(file);
  Tree tree = Tree::of_directory(file.owner(), modified);
  tree.add_file(kRootNode, kDiskName, file);
  return tree;
}

void install_wake_signal() {
  struct sigaction action = {};
  action.sa_handler = [](int) {};  // without SA_RESTART: blocking calls end with EINTR
  ::sigaction(kWakeSignal, &action, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
}

}  // namespace

Session::Session(Disk& disk, const Subject& subject, const Mountpoint& mountpoint, const MountOptions& options)
    : disk_(disk),
      image_(subject.image),
      mountpoint_(mountpoint),
      options_(options),
      file_(disk, owner_of(options, disk.info().read_only), subject.modified),
      tree_(tree_of(file_, mountpoint.kind, subject.modified)),
      served_(new Served{tree_, options_, [this] {
                           phase_ = Phase::serving;
                           phase_.notify_all();
                         }}) {}

Session::~Session() {
  phase_ = Phase::ended;  // without serve() too
  signals_.reset();
  if (session_ == nullptr) return;
  fuse_session_unmount(session_);
  fuse_session_destroy(session_);
}

Result<std::unique_ptr<Session>> Session::mount(Disk& disk, const Subject& subject, const Mountpoint& mountpoint,
                                                const MountOptions& options) {
  MountOptions effective = options;
  effective.read_only = disk.info().read_only;
  if (effective.read_only) effective.writeback_cache = false;  // there is nothing to write back
  std::unique_ptr<Session> session(new Session(disk, subject, mountpoint, effective));
  IMG_TRY(session->attach());
  return session;
}

Result<> Session::attach() {
  fuse_set_log_func(take_libfuse_message);
  install_wake_signal();
  // Keeps the kernel from waiting for this process to write when it needs memory to write to this process.
  (void)::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);

  std::string messages;
  mount_messages = &messages;
  std::string list = libfuse_options(options_, image_);
  std::array<char*, 3> words = {const_cast<char*>("imgfuse"), const_cast<char*>("-o"), list.data()};
  fuse_args args = FUSE_ARGS_INIT(words.size(), words.data());
  session_ = fuse_session_new(&args, &operations(), sizeof(fuse_lowlevel_ops), served_.get());
  fuse_opt_free_args(&args);
  if (session_ != nullptr) signals_.emplace([this] { end_loop(); });
  const bool mounted = session_ != nullptr && fuse_session_mount(session_, mountpoint_.path.c_str()) == 0;
  mount_messages = nullptr;
  if (!mounted)
    return fail(ErrorCode::io, "mount at {}: {}", mountpoint_.path, messages.empty() ? "refused" : messages);

  const auto entry = find_mount(mountpoint_.path);
  if (!entry) return fail(ErrorCode::io, "mount at {}: /proc/self/mountinfo does not list it", mountpoint_.path);
  device_ = entry->device;
  if (auto reporter = CloseReporter::listen(device_))
    reporter_ = std::move(*reporter);
  else
    log_warning("\"imgfuse umount\" will not know how the image was closed: {}", reporter.error().text());
  return {};
}

Result<> Session::serve(std::function<void()> on_ready) {
  std::thread attendant([this, &on_ready] { attend(on_ready); });

  const Result<> looped = loop();
  phase_ = Phase::ended;
  phase_.notify_all();
  stop_counting_ = true;
  fuse_session_unmount(session_);  // also ends calls of our own threads into the mount
  attendant.join();

  const Result<> closed = disk_.close();
  for (const Result<>* result : {&looped, &closed})
    if (!*result) log_error("{}: {}", image_, result->error().text());
  if (reporter_) reporter_->tell(closed);
  return closed ? looped : closed;
}

void Session::stop() { signals_->trigger(); }

Result<> Session::loop() {
  int error = 0;
  if (options_.single_threaded) {
    error = fuse_session_loop(session_);
  } else {
    // Workers that have nothing to do stay: starting a thread costs more than many requests.
    fuse_loop_config* config = fuse_loop_cfg_create();
    fuse_loop_cfg_set_clone_fd(config, options_.clone_fd ? 1 : 0);
    fuse_loop_cfg_set_max_threads(config, options_.max_threads);
    error = fuse_session_loop_mt(session_, config);
    fuse_loop_cfg_destroy(config);
  }
  if (error < 0) return fail(ErrorCode::io, "requests at {} ended: {}", mountpoint_.path, strerror(-error));
  return {};
}

/// Runs beside the loop: what cannot be done before requests are answered.
void Session::attend(const std::function<void()>& on_ready) {
  phase_.wait(Phase::starting);
  if (phase_ != Phase::serving) return;
  if (options_.writeback_cache && mountpoint_.kind == MountpointKind::file) publish_size();
  if (on_ready) on_ready();
  if (auto counted = disk_.count_allocated(stop_counting_); !counted)
    log_warning("{}: count allocated clusters: {}", image_, counted.error().text());
}

/// With a write-back cache the kernel is the master of size and time. It knows them from the lookup of a name, but the
/// root has none: until somebody sets them, a root file is empty.
void Session::publish_size() {
  if (auto set = set_size_and_time(mountpoint_.path, disk_.size(), file_.attributes().st_mtim); !set)
    log_warning("tell the kernel the size: {}", set.error().text());
}

/// Ends the loop from another thread. The signal may come between the loop's look at the flag and its wait, therefore
/// it is repeated.
void Session::end_loop() {
  if (phase_ == Phase::serving) write_back_pages();
  fuse_session_exit(session_);
  while (phase_ != Phase::ended) {
    pthread_kill(loop_thread_, kWakeSignal);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

/// As an unmount does, but while requests are still answered.
void Session::write_back_pages() {
  if (options_.read_only) return;
  const bool is_root = mountpoint_.kind == MountpointKind::file;
  if (auto written = write_back(is_root ? mountpoint_.path : mountpoint_.path + "/" + kDiskName, device_); !written)
    log_error("write back cached data: {}", written.error().text());
}

}  // namespace imgfuse::fuse
