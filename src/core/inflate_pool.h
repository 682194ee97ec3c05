// Threads that inflate clusters of a compressed image, so that one reader gets more than one processor's work.
#pragma once

#include <boost/intrusive/list.hpp>

#include <array>
#include <functional>
#include <optional>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "imgfuse/error.h"
#include "imgfuse/units.h"

namespace imgfuse {

/// Shares the clusters of one request among threads, and has those that sequential readers will want next inflated in
/// advance. The threads begin with the first work that there is for them, and end with stop().
///
/// Any thread may call run(). No lock is held while a job or `ahead` runs.
class InflatePool {
 public:
  struct Options {
    uint64_t cluster_size = 0;
    uint64_t window = 0;  ///< bytes that are inflated ahead of each of kReaders readers; 0: none
    unsigned threads = default_threads();
  };
  static constexpr uint64_t kReaders = 4;

  using Job = std::function<Result<>(size_t)>;
  /// Inflates the cluster at a guest offset, which may lie past the end of the disk, to where readers look for it.
  using Ahead = std::function<void(GuestOffset)>;

  InflatePool(Options options, Ahead ahead) : options_(options), ahead_(std::move(ahead)) {}
  ~InflatePool() { stop(); }
  InflatePool(const InflatePool&) = delete;
  InflatePool& operator=(const InflatePool&) = delete;

  /// Calls job(0) … job(count - 1), which are the compressed clusters of `request`, in this thread and in others; all
  /// have returned when it does. The first in order that failed tells the error.
  Result<> run(GuestRange request, size_t count, const Job& job) EXCLUDES(mutex_);

  /// Waits for what the threads are doing, and ends them. Later requests are their callers' work alone.
  void stop() EXCLUDES(mutex_);

 private:
  struct Batch : boost::intrusive::list_base_hook<> {
    Batch(const Job& batch_job, size_t batch_count) : job(batch_job), count(batch_count) {}
    const Job& job;
    const size_t count;
    size_t next = 0;
    size_t running = 0;
    size_t failed = count;  // the first that failed
    std::optional<Error> error;
  };
  /// What a sequential reader has read, and what is inflated for it. A position is a guest offset in bytes.
  struct Reader {
    uint64_t end = 0;       // of what it has read
    uint64_t bytes = 0;     // that it has read in sequence
    uint64_t next = 0;      // the next cluster to inflate …
    uint64_t limit = 0;     // … if it lies before this
    uint64_t last_use = 0;  // number of the request
  };

  static unsigned default_threads();
  void note(GuestRange request) REQUIRES(mutex_);
  void start_threads() REQUIRES(mutex_);
  void work() EXCLUDES(mutex_);
  std::optional<GuestOffset> take_ahead() REQUIRES(mutex_);
  size_t take_job(Batch& batch) REQUIRES(mutex_);
  void end_job(Batch& batch, size_t index, Result<> result) REQUIRES(mutex_);

  const Options options_;
  const Ahead ahead_;

  Mutex mutex_;
  ConditionVariable wanted_, finished_;
  boost::intrusive::list<Batch> batches_ GUARDED_BY(mutex_);  // those with jobs that nobody has taken
  std::array<Reader, kReaders> readers_ GUARDED_BY(mutex_);
  uint64_t requests_ GUARDED_BY(mutex_) = 0;
  std::vector<std::thread> threads_ GUARDED_BY(mutex_);
  bool stopped_ GUARDED_BY(mutex_) = false;
};

}  // namespace imgfuse
