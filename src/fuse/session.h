// A mounted disk: from mount to the closed image.
#pragma once

#include <pthread.h>
#include <sys/stat.h>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "fuse/close_report.h"
#include "fuse/mountpoint.h"
#include "fuse/options.h"
#include "fuse/raw_file.h"
#include "fuse/stop_signals.h"
#include "fuse/tree.h"

struct fuse_session;

namespace imgfuse::fuse {

struct Served;

/// Owns the mount; borrows the disk, but closes it. One thread makes it, serves and destroys it. Make it before there
/// are other threads: it handles signals for the whole process.
///
///     mount() ──► serve(): threads answer requests ──► unmounted, or a signal, or stop() ──► disk closed, report told
class Session {
 public:
  /// What the user sees of the image.
  struct Subject {
    std::string image;  ///< absolute path
    timespec modified;  ///< of the image file
  };
  /// Mounts. Requests wait in the kernel until serve(). Does not close the disk when it fails.
  static Result<std::unique_ptr<Session>> mount(Disk& disk, const Subject& subject, const Mountpoint& mountpoint,
                                                const MountOptions& options);
  ~Session();

  /// Serves until somebody unmounts, SIGTERM, SIGINT or SIGHUP comes, or stop() is called; then unmounts, closes the
  /// disk, and tells the ones who wait in `imgfuse umount`. Returns the error of closing, if any; it is in the log too.
  /// `on_ready` is called, in another thread, when the file can be used.
  Result<> serve(std::function<void()> on_ready);
  /// Any thread, while serve() runs or before.
  void stop();

 private:
  Session(Disk& disk, const Subject& subject, const Mountpoint& mountpoint, const MountOptions& options);
  Result<> attach();
  Result<> loop();
  void end_loop();
  void attend(const std::function<void()>& on_ready);
  void publish_size();
  void write_back_pages();

  // Fixed after mount().
  Disk& disk_;
  const std::string image_;
  const Mountpoint mountpoint_;
  const MountOptions options_;
  RawFile file_;
  Tree tree_;
  std::unique_ptr<Served> served_;
  fuse_session* session_ = nullptr;
  dev_t device_ = 0;  // of the mount
  std::optional<CloseReporter> reporter_;
  const pthread_t loop_thread_ = pthread_self();

  enum class Phase { starting, serving, ended };
  std::atomic<Phase> phase_ = Phase::starting;
  std::atomic<bool> stop_counting_ = false;
  std::optional<StopSignals> signals_;
};

}  // namespace imgfuse::fuse
