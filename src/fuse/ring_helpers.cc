#include "fuse/ring_helpers.h"

#include <pthread.h>

#include "fuse/disk_waits.h"
#include "fuse/ring_queue.h"

namespace imgfuse::fuse {
namespace {

constexpr unsigned kHelpers = 16;

}  // namespace

RingHelpers::RingHelpers(fuse_session* session) {
  for (unsigned i = 0; i < kHelpers; ++i) threads_.emplace_back([this, session] { work(session); });
}

RingHelpers::~RingHelpers() {
  {
    Lock lock(mutex_);
    ending_ = true;
    changed_.notify_all();
  }
  for (std::thread& thread : threads_) thread.join();
}

void RingHelpers::add(RingQueue& queue, RingEntry& entry) {
  Lock lock(mutex_);
  work_.push_back({&queue, &entry});
  changed_.notify_one();
}

void RingHelpers::work(fuse_session* session) {
  ::pthread_setname_np(::pthread_self(), "ring helper");
  for (;;) {
    Work next;
    {
      Lock lock(mutex_);
      while (work_.empty() && !ending_) changed_.wait(lock);
      if (work_.empty()) return;
      next = work_.front();
      work_.pop_front();
    }
    const bool slow = DiskWaits::watch_helper(*next.entry, [&] { next.entry->answer(session); });
    next.queue->answered(*next.entry, slow);
  }
}

}  // namespace imgfuse::fuse
