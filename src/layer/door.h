// Who is inside, and a door that can be closed.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "base/mutex.h"

namespace imgfuse::layer {

/// Requests go in and out by the thousand, and now and then somebody needs the house for himself. A visit costs two
/// atomic additions to a counter that few threads share, and two loads of a flag that hardly ever changes. Any thread
/// may call; a thread must not visit twice, since the door could be closed in between.
class Door {
 public:
  class [[nodiscard]] Visit {
   public:
    explicit Visit(Door& door) : door_(door), slot_(door.enter()) {}
    ~Visit() { door_.leave(slot_); }
    Visit(const Visit&) = delete;
    Visit& operator=(const Visit&) = delete;

   private:
    Door& door_;
    std::atomic<uint64_t>& slot_;
  };

  /// Returns when nobody is inside; who comes later waits. One thread at a time may have it closed, others wait.
  void close() EXCLUDES(mutex_);
  void open() EXCLUDES(mutex_);

 private:
  struct alignas(64) Slot {
    std::atomic<uint64_t> inside = 0;
  };
  std::atomic<uint64_t>& enter() EXCLUDES(mutex_);
  void leave(std::atomic<uint64_t>& slot) EXCLUDES(mutex_);
  void wait_outside() EXCLUDES(mutex_);
  bool is_empty() const;

  std::array<Slot, 16> slots_;
  std::atomic<bool> closed_ = false;

  Mutex mutex_;
  ConditionVariable changed_;
};

}  // namespace imgfuse::layer
