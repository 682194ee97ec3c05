// A mirror at work: the engine with threads.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "imgfuse/jobs.h"
#include "job/increment.h"
#include "job/mirror_copy.h"
#include "job/mirror_engine.h"
#include "layer/switch.h"

namespace imgfuse::job {

/// One thread looks at the disk, waits, and concludes; as many as there may be operations in flight copy, but no more
/// than there are CPUs as long as none of these waits. A disk is not replaced while the file of one of its snapshots is
/// open: that pauses the job.
///
///     running ─► ready ─► concluding ─► completed, finished
///        └── paused ──┘       (any) ─► cancelled, failed
///
/// A backup concludes when nothing is left; what is about to change is copied by who changes it. So does a stream,
/// which needs to know of no change, since what is local stays so. A commit is a mirror of some layers.
///
/// The engine is asked and told under the mutex, which nobody holds during I/O.
class MirrorJob {
 public:
  struct Sides {
    layer::Switch& through;           ///< where requests come in
    Disk& source;                     ///< what is behind it
    std::unique_ptr<Disk> target;     ///< null: a stream, which fills the source
    bool target_has_backing = false;  ///< or content of its own
    /// Both are called while nobody is inside, at most one of them and once; what is given back is closed, unless it is
    /// null. The job has reached its aim: another disk takes the source's place. After an error some disk is there.
    std::function<Result<std::unique_ptr<Disk>>(layer::Standstill&, std::unique_ptr<Disk> target)> complete;
    /// It has not, or was to leave a copy: the disk that was there at first comes back.
    std::function<std::unique_ptr<Disk>(layer::Standstill&, std::unique_ptr<Disk> target)> leave;
    JobHooks hooks;
    uint32_t layers = 0;  ///< of a stream or a commit: how deep the base lies; 0: there is none
  };
  MirrorJob(uint64_t id, const JobOptions& options, Sides sides);
  ~MirrorJob();

  /// The instant from which on changes are known. After an error there is no job, and the target is closed.
  Result<> start();
  /// Returns when the job is over.
  void join();

  uint64_t id() const { return id_; }
  JobStatus status() const EXCLUDES(mutex_);
  Result<> pause() EXCLUDES(mutex_);
  Result<> resume() EXCLUDES(mutex_);
  Result<> set_rate(uint64_t rate) EXCLUDES(mutex_);
  Result<> cancel() EXCLUDES(mutex_);
  /// `end` is not WhenReady::wait.
  Result<> end_when_ready(WhenReady end) EXCLUDES(mutex_);

 private:
  class Changes;

  Result<> mark_first() EXCLUDES(mutex_);
  void run();
  bool survey() EXCLUDES(mutex_);
  void serve() EXCLUDES(mutex_);
  bool wait_for_end() EXCLUDES(mutex_);
  bool conclude() EXCLUDES(mutex_);
  bool drain() EXCLUDES(mutex_);
  bool may_part(const layer::Standstill& standstill) EXCLUDES(mutex_);
  Result<> reset_bitmap() EXCLUDES(mutex_);
  void part(layer::Standstill& standstill) EXCLUDES(mutex_);
  void leave(layer::Standstill& standstill);
  void copy() EXCLUDES(mutex_);
  Result<> copy(const MirrorEngine::Operation& operation);
  bool keeps_cpus_busy() const REQUIRES(mutex_);
  void wait_for_work(Lock& lock) REQUIRES(mutex_);
  void close_down() EXCLUDES(mutex_);

  // For those who change the disk.
  void changed(GuestRange range) EXCLUDES(mutex_);
  void save(GuestRange range) EXCLUDES(mutex_);
  MirrorEngine::Entry enter(GuestRange range) EXCLUDES(mutex_);
  /// `target`: what became of the target's part; nothing if the source's failed.
  void leave(GuestRange range, const std::optional<Result<>>& target) EXCLUDES(mutex_);

  void failed(const Error& error) REQUIRES(mutex_);
  bool try_again(const Error& error) EXCLUDES(mutex_);
  bool is_backup() const { return options_.kind == JobKind::backup; }
  /// Nothing comes back: it ends when all has been copied once.
  bool is_finite() const { return is_backup() || options_.kind == JobKind::stream; }
  bool is_near() const REQUIRES(mutex_);
  bool is_ending() const REQUIRES(mutex_) { return cancelled_ || state_ == JobState::failed; }
  Result<> check_at_work() const REQUIRES(mutex_);
  void set_state(JobState state) REQUIRES(mutex_);

  const uint64_t id_;
  const JobOptions options_;
  const unsigned cpus_;
  Sides sides_;
  Disk& target_;
  std::unique_ptr<Disk> unused_;  // when it is over
  bool parted_ = false;           // the job has no part in requests any more
  bool replaced_ = false;         // what is served is another disk than at first
  std::unique_ptr<Changes> changes_;
  std::unique_ptr<Increment> increment_;  // of an incremental backup
  std::thread thread_;
  std::vector<std::thread> workers_;

  mutable Mutex mutex_;
  ConditionVariable work_;                                 // there may be something to copy
  ConditionVariable changed_;                              // anything else
  std::optional<MirrorEngine> engine_ GUARDED_BY(mutex_);  // until the job is over
  JobState state_ GUARDED_BY(mutex_) = JobState::running;
  WhenReady when_ready_ GUARDED_BY(mutex_);
  bool surveyed_ GUARDED_BY(mutex_) = false;
  uint64_t first_copy_ GUARDED_BY(mutex_) = 0;  // bytes: what there was to copy then
  bool ready_ GUARDED_BY(mutex_) = false;
  bool cancelled_ GUARDED_BY(mutex_) = false;
  bool draining_ GUARDED_BY(mutex_) = false;
  bool dismissed_ GUARDED_BY(mutex_) = false;    // the workers are
  unsigned idle_ GUARDED_BY(mutex_) = 0;         // workers that wait for a call
  bool copies_wait_ GUARDED_BY(mutex_) = false;  // the last one did, for the host rather than for a CPU
  unsigned waiting_ GUARDED_BY(mutex_) = 0;      // requests that wait for operations
  unsigned failures_ GUARDED_BY(mutex_) = 0;     // one after the other
  Time retry_at_ GUARDED_BY(mutex_);             // after an error that is ignored
  uint64_t copied_ GUARDED_BY(mutex_) = 0;       // when it is over
  std::optional<Error> error_ GUARDED_BY(mutex_);
};

inline Time now() { return std::chrono::steady_clock::now(); }

/// "mirror", "backup", …
const char* to_word(JobKind kind);

/// How the options fit together, and to a disk of this size.
Result<> check_options(const JobOptions& options, uint64_t size);

}  // namespace imgfuse::job
