// Threads that answer what would hold up a ring's queue.
#pragma once

#include <deque>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "fuse/ring_entry.h"

namespace imgfuse::fuse {

class RingQueue;

/// Shared by the queues. They must outlive what they have added, and a session outlives the helpers.
class RingHelpers {
 public:
  explicit RingHelpers(fuse_session* session);
  /// Answers what is left first.
  ~RingHelpers();
  RingHelpers(const RingHelpers&) = delete;
  RingHelpers& operator=(const RingHelpers&) = delete;

  /// The queue hears of it by RingQueue::answered().
  void add(RingQueue& queue, RingEntry& entry) EXCLUDES(mutex_);

 private:
  struct Work {
    RingQueue* queue;
    RingEntry* entry;
  };
  void work(fuse_session* session);

  Mutex mutex_;
  ConditionVariable changed_;
  std::deque<Work> work_ GUARDED_BY(mutex_);
  bool ending_ GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace imgfuse::fuse
