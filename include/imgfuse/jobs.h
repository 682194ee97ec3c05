// Jobs on a disk that is in use.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "imgfuse/disk.h"
#include "imgfuse/error.h"

namespace imgfuse {

enum class MirrorSync {
  full,  ///< all that the disk reads as
  top,   ///< what its top layer holds: the target has the backing file that the disk has
  none,  ///< what changes from now on: the target reads as the disk does already
};

/// What becomes of a job when reading or writing fails.
enum class OnError {
  stop,    ///< it pauses; resume() tries again
  report,  ///< it fails
  ignore,  ///< it goes on, and tries again later
  enospc,  ///< it pauses if there is no space, and fails otherwise
};

/// What a mirror does when target and disk are alike.
enum class WhenReady {
  wait,      ///< goes on, until it is told
  complete,  ///< the target takes the disk's place
  finish,    ///< leaves the target as a copy
};

enum class JobKind {
  mirror,  ///< a copy of the disk at the end: what changes meanwhile is copied again
  backup,  ///< a copy of the disk at the start: what is about to change is copied before
  stream,  ///< what layers below hold is copied into the disk's own, which then stands on the base, or on nothing
  commit,  ///< what layers above the base hold is copied into the base, which then takes the disk's place
};

struct JobOptions {
  std::string target;  ///< of a mirror or a backup: an image that exists; absolute path
  std::optional<std::string> format;
  bool target_is_zero = false;  ///< it reads as zeros: zeros need not be written
  MirrorSync sync = MirrorSync::full;
  uint64_t granularity = 65536;          ///< bytes per bit of what is remembered; a power of two, 512 to 64 MiB
  uint64_t buffer = uint64_t{16} << 20;  ///< bytes of memory for what is on its way
  unsigned in_flight = 16;               ///< operations at a time, 1 to 64
  uint64_t rate = 0;                     ///< bytes per second; 0: no limit
  bool write_blocking = false;           ///< a write returns when both sides have it
  OnError on_error = OnError::report;
  WhenReady when_ready = WhenReady::wait;  ///< a backup finishes in any case
  JobKind kind = JobKind::mirror;
  /// Of a backup: only what this persistent bitmap says is copied, and it is clear from then on. But for a backup that
  /// succeeds it stays as it is.
  std::optional<std::string> bitmap;
  /// Of a stream or a commit: an image of the backing chain. Else a stream goes to its end, a commit to the first one.
  std::optional<std::string> base;
};

enum class JobState {
  running,     ///< copies what there is
  ready,       ///< nearly alike; copies what changes
  paused,      ///< by the user, or by an error
  concluding,  ///< the last steps
  completed,   ///< the target has taken the disk's place
  finished,    ///< the target is the copy that was wanted
  cancelled,   ///< as the user wanted; the target is worth nothing
  failed,      ///< by its error; the target is worth nothing
};
inline bool is_over(JobState state) { return state >= JobState::completed; }

struct JobStatus {
  uint64_t id = 0;
  std::string kind;    ///< "mirror", "backup", "stream", "commit"
  std::string target;  ///< path; of a stream: the disk's own image
  JobState state = JobState::running;
  uint64_t copied = 0;         ///< bytes so far
  uint64_t remaining = 0;      ///< bytes known to be left; grows as the disk is written to, and while it is looked at
  uint64_t rate = 0;           ///< limit in bytes per second; 0: none
  std::optional<Error> error;  ///< the last one
};

/// What jobs ask of who shows the disk to others. Called in a thread of a job, beside requests.
struct JobHooks {
  /// Brings everything to the disk that has been written by others and waits in a cache.
  std::function<Result<>()> settle = [] { return Result<>(); };
  /// Another image has taken the disk's place.
  std::function<void()> replaced = [] {};
};

/// What Disk::jobs() gives. Jobs have numbers, from 1; those that are over are remembered for a while.
///
/// Threads: any thread may call anything while the disk is open.
class Jobs {
 public:
  virtual ~Jobs() = default;

  /// Starts a job and returns its number. One job at a time.
  virtual Result<uint64_t> start(const JobOptions& options) = 0;

  /// Oldest first.
  virtual std::vector<JobStatus> list() const = 0;
  virtual Result<> pause(uint64_t job) = 0;
  virtual Result<> resume(uint64_t job) = 0;
  virtual Result<> set_rate(uint64_t job, uint64_t rate) = 0;
  /// Ends it as soon as it can be; list() tells when.
  virtual Result<> cancel(uint64_t job) = 0;
  virtual Result<> complete(uint64_t job) = 0;
  virtual Result<> finish(uint64_t job) = 0;

  /// To be set before there is a job.
  virtual void set_hooks(JobHooks hooks) = 0;
  /// Cancels what runs, and returns when it has ended. There are no more jobs from then on. Closing the disk does the
  /// same, but at a time when a hook may have to wait for who closes it.
  virtual void end() = 0;
};

/// An image that a job may write to, open.
struct JobTarget {
  std::unique_ptr<Disk> disk;
  bool has_backing = false;  ///< another image fills what is not written
};
using OpenTarget = std::function<Result<JobTarget>(const std::string& path, const std::optional<std::string>& format)>;

/// An image below another one.
struct BackingLayer {
  uint32_t depth = 0;  ///< 1: the image's own backing file
  std::string path;
  std::string format;
};

/// The files that a disk consists of, for jobs that exchange one for another: what is not in Disk. Images are called by
/// the name that their disk has, and nobody has them open but for what is said. A job calls while no request is served.
class ImageChain {
 public:
  virtual ~ImageChain() = default;

  /// That the image's name leads to the file still that the disk was opened from: it may have been moved, or be covered
  /// by the mount itself. Otherwise it must not be closed, since it could not be opened again.
  virtual Result<> check(const std::string& image) = 0;
  /// Without a base: the first layer.
  virtual Result<BackingLayer> find(const std::string& image, const std::optional<std::string>& base) = 0;
  /// As the disk was opened at first.
  virtual Result<std::unique_ptr<Disk>> open(const std::string& image, const std::string& format) = 0;
  virtual Result<std::unique_ptr<Disk>> open_base(const BackingLayer& base) = 0;
  /// As open(), but that it reads the base through a disk that is open already, and outlives it.
  virtual Result<std::unique_ptr<Disk>> open_above(const std::string& image, const std::string& format,
                                                   const BackingLayer& base, Disk& base_disk) = 0;
  /// The image stands on the base, or on nothing, from now on. A crash leaves the one or the other.
  virtual Result<> set_backing(const std::string& image, const std::optional<BackingLayer>& base) = 0;
  /// The image holds nothing of its own any more. The base, which may be open, reads as it does.
  virtual Result<> empty(const std::string& image, const std::string& format, const BackingLayer& base) = 0;
};

/// The same disk, with jobs(). Closing it cancels what runs. Without a chain there are only mirrors and backups.
std::unique_ptr<Disk> with_jobs(std::unique_ptr<Disk> disk, OpenTarget open_target,
                                std::shared_ptr<ImageChain> chain = nullptr);

}  // namespace imgfuse
