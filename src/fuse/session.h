// A mounted disk: from mount to the closed image.
#pragma once

#include <pthread.h>
#include <sys/stat.h>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "control/commands.h"
#include "control/server.h"
#include "fuse/connection.h"
#include "fuse/kernel_cache.h"
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
///
/// While it serves, a control socket takes the commands of control/commands.h.
class Session : private control::Presenter {
 public:
  /// What the user sees of the image.
  struct Subject {
    std::string image;  ///< absolute path
    timespec modified;  ///< of the image file, as are:
    dev_t device = 0;
    ino_t inode = 0;
    std::string ephemeral =
        {};  ///< what the disk was called that keeps changes until the unmount; empty: there is none
  };
  /// Mounts. Requests wait in the kernel until serve(). Does not close the disk when it fails.
  static Result<std::unique_ptr<Session>> mount(Disk& disk, const Subject& subject, const Mountpoint& mountpoint,
                                                const MountOptions& options);
  ~Session() override;

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
  void write_back_pages();
  std::string text_of(const std::vector<std::string>& commands);

  // For the commands, in the thread of the control socket.
  control::Json describe() const override;
  Result<> settle() override;
  Result<> replaced() override;
  Result<> resized() override;
  void snapshots_changed() override;

  // Fixed after mount().
  Disk& disk_;
  const Subject subject_;
  const Mountpoint mountpoint_;
  const MountOptions options_;
  RawFile file_;
  Tree tree_;
  Connection connection_{options_, file_};
  std::unique_ptr<Served> served_;
  fuse_session* session_ = nullptr;
  std::optional<KernelCache> cache_;
  control::Commands commands_{disk_, *this};
  std::unique_ptr<control::Server> control_;  // null if there can be none
  const pthread_t loop_thread_ = pthread_self();

  enum class Phase { starting, serving, ended };
  std::atomic<Phase> phase_ = Phase::starting;
  std::atomic<bool> stop_counting_ = false;
  std::optional<StopSignals> signals_;
};

}  // namespace imgfuse::fuse
