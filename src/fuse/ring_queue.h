// One CPU's queue of requests that come over a ring.
#pragma once

#include <liburing.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "base/unique_fd.h"
#include "fuse/disk_waits.h"
#include "fuse/ring_entry.h"
#include "imgfuse/error.h"

namespace imgfuse::fuse {

class RingHelpers;

/// A ring, and the thread that serves it, bound to its CPU.
///
///                         ┌── the answer is made ──────────────── command: commit and fetch the next ──┐
///     kernel ──► request ─┼── bytes are missing ── read of the last one, in the same ring ── again ──┤
///                         └── will wait ── helper ── answered(), which wakes the thread ──────────────┘
class RingQueue {
 public:
  explicit RingQueue(uint16_t number) : number_(number) {}
  ~RingQueue();
  RingQueue(const RingQueue&) = delete;
  RingQueue& operator=(const RingQueue&) = delete;

  /// Ring and buffers. Nothing is said to the kernel's FUSE yet.
  Result<> make();
  /// `fd`: the session's /dev/fuse. All of it must outlive stop().
  void start(fuse_session* session, int fd, RingHelpers& helpers);
  /// Waits for what is under way.
  void stop();
  /// From a helper: the entry is answered, and took long or not.
  void answered(RingEntry& entry, bool slow) EXCLUDES(mutex_);

 private:
  /// Requests of one CPU that are under way at once.
  static constexpr unsigned kDepth = 24;

  /// And what is known of a READ in it.
  struct Entry : RingEntry {
    NoWait::Clock::time_point begun;
    unsigned fetches = 0;
  };
  struct Done {
    RingEntry* entry;
    bool slow;
  };
  class Fetcher;

  void serve();
  void bind_to_cpu();
  bool left() const;
  void take(uint64_t user_data, int result);
  void take_read(Entry& entry);
  void fetch(Entry& entry, int file, uint64_t last);
  void have_helped(Entry& entry);
  void commit(RingEntry& entry);
  void commit(RingEntry& entry, bool slow);
  void commit_done() EXCLUDES(mutex_);

  void wake();
  void wait_for_wake();
  void command(uint32_t operation, RingEntry& entry, uint64_t commit_id);
  io_uring_sqe* next_sqe();

  const uint16_t number_;
  io_uring ring_ = {};
  bool ring_made_ = false;
  UniqueFd wake_;
  fuse_session* session_ = nullptr;
  int fd_ = -1;
  RingHelpers* helpers_ = nullptr;
  std::array<Entry, kDepth> entries_;
  std::thread thread_;
  std::atomic<bool> ending_ = false;
  // The thread's own:
  size_t waiting_ = 0;  // entries that the kernel has
  size_t with_helpers_ = 0;
  size_t fetching_ = 0;     // entries for which a part is fetched
  std::byte fetched_ = {};  // what is read then, which nobody looks at
  DiskWaits disk_waits_{kDepth};

  Mutex mutex_;
  std::vector<Done> done_ GUARDED_BY(mutex_);
};

}  // namespace imgfuse::fuse
