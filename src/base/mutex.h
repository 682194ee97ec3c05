// Mutexes that clang's -Wthread-safety understands, and that know their place in the order of locks.
#pragma once

#include <cassert>
#include <chrono>
#include <condition_variable>
#include <cstdint>

#include "base/patient_mutex.h"

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

/// Locks are taken in increasing rank only (src/README.md, "Locks").
enum class LockRank : uint8_t { door, tables, search, header, metadata, cache, leaf };

/// Which ranks the calling thread holds. Checked wherever asserts are compiled in; costs a few thread-local counts.
class HeldRanks {
 public:
  static void take(LockRank rank) {
    assert(highest_held() < level(rank) || rank == LockRank::leaf);
    ++counts_[static_cast<unsigned>(rank)];
  }
  static void drop(LockRank rank) { --counts_[static_cast<unsigned>(rank)]; }
  /// Nothing is held that must not be held during I/O.
  static bool may_block() { return highest_held() < level(LockRank::metadata); }

 private:
  static unsigned level(LockRank rank) { return 1 + static_cast<unsigned>(rank); }
  static unsigned highest_held() {
    for (unsigned rank = kRanks; rank > 0; --rank)
      if (counts_[rank - 1] > 0) return rank;
    return 0;
  }

  static constexpr unsigned kRanks = 1 + static_cast<unsigned>(LockRank::leaf);
  static inline thread_local uint8_t counts_[kRanks] = {};
};

/// What is never held across I/O, as the higher ranks are with few exceptions, is free again sooner than a thread has
/// gone to sleep and come back: it is tried for some microseconds before its holder is waited for.
template <class Native>
class CAPABILITY("mutex") RankedMutex {
 public:
  explicit RankedMutex(LockRank rank = LockRank::leaf) : mutex_(rank < LockRank::metadata ? 0 : kTries), rank_(rank) {}

  void lock() ACQUIRE() {
    HeldRanks::take(rank_);
    mutex_.lock();
  }
  void unlock() RELEASE() {
    mutex_.unlock();
    HeldRanks::drop(rank_);
  }
  void lock_shared() ACQUIRE_SHARED() {
    HeldRanks::take(rank_);
    mutex_.lock_shared();
  }
  void unlock_shared() RELEASE_SHARED() {
    mutex_.unlock_shared();
    HeldRanks::drop(rank_);
  }

 private:
  static constexpr int kTries = 100;

  Native mutex_;
  const LockRank rank_;
};

using Mutex = RankedMutex<PatientMutex>;
using SharedMutex = RankedMutex<PatientSharedMutex>;

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
  /// Until notified, or until then; it may return for no reason.
  template <class L>
  void wait_until(L& lock, std::chrono::steady_clock::time_point deadline) NO_THREAD_SAFETY_ANALYSIS {
    condition_.wait_until(lock, deadline);
  }
  void notify_one() { condition_.notify_one(); }
  void notify_all() { condition_.notify_all(); }

 private:
  std::condition_variable_any condition_;
};

}  // namespace imgfuse
