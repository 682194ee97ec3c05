#include "core/idle_timer.h"

namespace imgfuse {

void IdleTimer::touch() {
  Lock lock(mutex_);
  last_ = clock_.now();
  if (armed_) return;  // the thread looks at the time by itself
  armed_ = true;
  if (!thread_.joinable()) {
    thread_ = std::thread([this] { run(); });
  } else {
    changed_.notify_one();
  }
}

void IdleTimer::stop() {
  std::thread ended;
  {
    Lock lock(mutex_);
    stopped_ = true;
    changed_.notify_one();
    ended.swap(thread_);
  }
  if (ended.joinable()) ended.join();
}

void IdleTimer::run() {
  Lock lock(mutex_);
  while (!stopped_) {
    if (!armed_) {
      changed_.wait(lock);
    } else if (clock_.now() < last_ + period_) {
      clock_.wait_until(changed_, lock, last_ + period_);
    } else {
      armed_ = false;
      lock.unlock();
      act_();
      lock.lock();
    }
  }
}

}  // namespace imgfuse
