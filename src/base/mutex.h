// Mutexes that clang's -Wthread-safety understands. The ranks that order them stand in src/README.md.
#pragma once

#include <condition_variable>
#include <mutex>
#include <shared_mutex>

#if defined(__clang__)
#define IMG_THREAD_ANNOTATION(x) __attribute__((x))
#else
#define IMG_THREAD_ANNOTATION(x)
#endif

#define CAPABILITY(name) IMG_THREAD_ANNOTATION(capability(name))
#define SCOPED_CAPABILITY IMG_THREAD_ANNOTATION(scoped_lockable)
#define GUARDED_BY(mutex) IMG_THREAD_ANNOTATION(guarded_by(mutex))
#define REQUIRES(...) IMG_THREAD_ANNOTATION(requires_capability(__VA_ARGS__))
#define REQUIRES_SHARED(...) IMG_THREAD_ANNOTATION(requires_shared_capability(__VA_ARGS__))
#define EXCLUDES(...) IMG_THREAD_ANNOTATION(locks_excluded(__VA_ARGS__))
#define ACQUIRE(...) IMG_THREAD_ANNOTATION(acquire_capability(__VA_ARGS__))
#define ACQUIRE_SHARED(...) IMG_THREAD_ANNOTATION(acquire_shared_capability(__VA_ARGS__))
#define RELEASE(...) IMG_THREAD_ANNOTATION(release_capability(__VA_ARGS__))
#define RELEASE_SHARED(...) IMG_THREAD_ANNOTATION(release_shared_capability(__VA_ARGS__))
#define RELEASE_GENERIC(...) IMG_THREAD_ANNOTATION(release_generic_capability(__VA_ARGS__))
#define RETURN_CAPABILITY(x) IMG_THREAD_ANNOTATION(lock_returned(x))
#define NO_THREAD_SAFETY_ANALYSIS IMG_THREAD_ANNOTATION(no_thread_safety_analysis)

namespace imgfuse {

class CAPABILITY("mutex") Mutex {
 public:
  void lock() ACQUIRE() { mutex_.lock(); }
  void unlock() RELEASE() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
};

class CAPABILITY("mutex") SharedMutex {
 public:
  void lock() ACQUIRE() { mutex_.lock(); }
  void unlock() RELEASE() { mutex_.unlock(); }
  void lock_shared() ACQUIRE_SHARED() { mutex_.lock_shared(); }
  void unlock_shared() RELEASE_SHARED() { mutex_.unlock_shared(); }

 private:
  std::shared_mutex mutex_;
};

/// Holds a mutex for a scope; may be dropped and taken again inside it, and waited on with ConditionVariable.
template <class M>
class SCOPED_CAPABILITY LockOf {
 public:
  explicit LockOf(M& mutex) ACQUIRE(mutex) : mutex_(mutex) { mutex_.lock(); }
  ~LockOf() RELEASE() {
    if (held_) mutex_.unlock();
  }
  LockOf(const LockOf&) = delete;
  LockOf& operator=(const LockOf&) = delete;

  void lock() ACQUIRE() {
    mutex_.lock();
    held_ = true;
  }
  void unlock() RELEASE() {
    mutex_.unlock();
    held_ = false;
  }

 private:
  M& mutex_;
  bool held_ = true;
};
using Lock = LockOf<Mutex>;
using ExclusiveLock = LockOf<SharedMutex>;

class SCOPED_CAPABILITY SharedLock {
 public:
  explicit SharedLock(SharedMutex& mutex) ACQUIRE_SHARED(mutex) : mutex_(mutex) { mutex_.lock_shared(); }
  ~SharedLock() RELEASE_GENERIC() { mutex_.unlock_shared(); }
  SharedLock(const SharedLock&) = delete;
  SharedLock& operator=(const SharedLock&) = delete;

 private:
  SharedMutex& mutex_;
};

/// Waits with a Lock (or a Mutex that the caller holds).
class ConditionVariable {
 public:
  template <class L>
  void wait(L& lock) NO_THREAD_SAFETY_ANALYSIS {
    condition_.wait(lock);
  }
  void notify_one() { condition_.notify_one(); }
  void notify_all() { condition_.notify_all(); }

 private:
  std::condition_variable_any condition_;
};

}  // namespace imgfuse
