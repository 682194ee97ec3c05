#include "fuse/session.h"

#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <array>
#include <cassert>
#include <cerrno>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <thread>

#include "base/log.h"
#include "fuse/operations.h"
#include "fuse/service.h"
#include "imgfuse/jobs.h"

namespace imgfuse::fuse {
namespace {

/// Sent to the looping thread, so that it looks whether it is to end. Ignored by default: a stray one does no harm.
constexpr int kWakeSignal = SIGURG;

constexpr const char* kDiskName = "disk.raw";
constexpr const char* kSnapshotFolder = "snapshots";
constexpr NodeNumber kDiskNode = kRootNode + 1;  // in a directory

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
  [[maybe_unused]] const NodeNumber disk = tree.add_file(kRootNode, kDiskName, file);
  assert(disk == kDiskNode);
  if (file.disk().snapshots() != nullptr) tree.add_snapshots(kRootNode, kSnapshotFolder, file.disk(), file.owner());
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
      subject_(subject),
      mountpoint_(mountpoint),
      options_(options),
      file_(disk, owner_of(options, disk.info().read_only), subject.modified),
      tree_(tree_of(file_, mountpoint.kind, subject.modified)),
      served_(new Served{tree_, options_,
                         [this] {
                           phase_ = Phase::serving;
                           phase_.notify_all();
                         },
                         &connection_}) {
  if (mountpoint_.kind == MountpointKind::directory) {
    tree_.add_text(kRootNode, "info.json", [this] { return text_of({"info"}); });
    tree_.add_text(kRootNode, "stats.json", [this] { return text_of({"statistics", "jobs"}); });
  }
  if (Jobs* const jobs = disk_.jobs()) jobs->set_hooks({[this] { return settle(); }, [this] { snapshots_changed(); }});
}

Session::~Session() {
  phase_ = Phase::ended;  // without serve() too
  signals_.reset();
  control_.reset();
  if (session_ == nullptr) return;
  fuse_session_unmount(session_);
  connection_.stop();
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
  std::string list = libfuse_options(options_, subject_.image);
  std::array<char*, 3> words = {const_cast<char*>("imgfuse"), const_cast<char*>("-o"), list.data()};
  fuse_args args = FUSE_ARGS_INIT(words.size(), words.data());
  session_ = fuse_session_new(&args, &operations(), sizeof(fuse_lowlevel_ops), served_.get());
  fuse_opt_free_args(&args);
  if (session_ != nullptr) signals_.emplace([this] { end_loop(); });
  const bool mounted = session_ != nullptr && fuse_session_mount(session_, mountpoint_.path.c_str()) == 0;
  mount_messages = nullptr;
  if (!mounted)
    return fail(ErrorCode::io, "mount at {}: {}", mountpoint_.path, messages.empty() ? "refused" : messages);

  connection_.attach(session_);
  const auto entry = find_mount(mountpoint_.path);
  if (!entry) return fail(ErrorCode::io, "mount at {}: /proc/self/mountinfo does not list it", mountpoint_.path);
  const bool is_root = mountpoint_.kind == MountpointKind::file;
  const std::string path = is_root ? mountpoint_.path : mountpoint_.path + "/" + kDiskName;
  cache_.emplace(session_, KernelCache::Place{path, entry->device, is_root ? kRootNode : kDiskNode}, file_);
  if (auto server = control::Server::listen(entry->device))
    control_ = std::move(*server);
  else
    log_warning("no control socket, so \"imgfuse umount\" will not know how the image was closed: {}",
                server.error().text());
  return {};
}

Result<> Session::serve(std::function<void()> on_ready) {
  std::thread attendant([this, &on_ready] { attend(on_ready); });

  const Result<> looped = loop();
  phase_ = Phase::ended;
  phase_.notify_all();
  tell_service_manager("STOPPING=1", "closing " + subject_.image);
  stop_counting_ = true;
  if (control_ && looped) control_->quiesce();  // its calls have been answered, or fail since the mount is gone
  fuse_session_unmount(session_);               // also ends calls of our own threads into the mount
  connection_.stop();
  attendant.join();
  if (control_) control_->quiesce();

  if (tree_.snapshots() != nullptr) tree_.snapshots()->close_all();
  const Result<> closed = disk_.close();
  for (const Result<>* result : {&looped, &closed})
    if (!*result) log_error("{}: {}", subject_.image, result->error().text());
  if (control_) control_->tell_closed(closed);
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
  if (control_) control_->start([this](const control::Request& request) { return commands_.run(request); });
  // With a write-back cache the kernel knows a file's size from the lookup of its name, but the root has none: until
  // somebody sets it, a root file is empty.
  if (options_.writeback_cache && mountpoint_.kind == MountpointKind::file)
    if (auto published = cache_->publish_size(); !published)
      log_warning("tell the kernel the size: {}", published.error().text());
  if (on_ready) on_ready();
  tell_service_manager("READY=1", subject_.image + " at " + mountpoint_.path);
  if (auto counted = disk_.count_allocated(stop_counting_); !counted)
    log_warning("{}: count allocated clusters: {}", subject_.image, counted.error().text());
}

/// Ends the loop from another thread. The signal may come between the loop's look at the flag and its wait, therefore
/// it is repeated.
void Session::end_loop() {
  if (phase_ == Phase::serving) {
    if (control_) control_->quiesce();  // its commands may wait for requests of their own, as jobs may
    if (Jobs* const jobs = disk_.jobs()) jobs->end();
    write_back_pages();
  }
  fuse_session_exit(session_);
  while (phase_ != Phase::ended) {
    pthread_kill(loop_thread_, kWakeSignal);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

/// As an unmount does, but while requests are still answered.
void Session::write_back_pages() {
  if (auto written = cache_->write_back(); !written) log_error("write back cached data: {}", written.error().text());
}

/// The image is not the one that was mounted any more when a mirror has been completed.
control::Json Session::describe() const {
  std::string image = disk_.info().name;
  struct stat attributes = {};
  const bool ephemeral = !subject_.ephemeral.empty() && (image == subject_.ephemeral || image.starts_with("/proc/"));
  const bool named = image.starts_with('/') && !ephemeral;
  const bool replaced = named && image != subject_.image && ::stat(image.c_str(), &attributes) == 0;
  if (!replaced) image = subject_.image;
  return {{"image", image},
          {"image-device", replaced ? attributes.st_dev : subject_.device},
          {"image-inode", replaced ? attributes.st_ino : subject_.inode},
          {"mountpoint", mountpoint_.path},
          {"ephemeral", ephemeral},
          {"transport", connection_.has_rings() ? "io_uring" : "/dev/fuse"},
          {"passthrough", connection_.passes_through()}};
}

/// One command's answer as it is, of several those that there are under their names.
std::string Session::text_of(const std::vector<std::string>& commands) {
  control::Json all = control::Json::object();
  for (const std::string& command : commands)
    if (auto answer = commands_.run({command})) all[command] = std::move(*answer);
  return control::to_text(commands.size() > 1 ? all : all[commands.front()]) + "\n";
}

Result<> Session::settle() { return cache_->write_back(); }

Result<> Session::replaced() {
  file_.touch();
  IMG_TRY(cache_->drop());
  return cache_->publish_size();
}

Result<> Session::resized() {
  file_.touch();
  return cache_->publish_size();
}

void Session::snapshots_changed() {
  if (tree_.snapshots() != nullptr) tree_.snapshots()->refresh();
}

}  // namespace imgfuse::fuse
