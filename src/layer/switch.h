// A disk in use that can become another one.
#pragma once

#include <memory>
#include <string>

#include "base/mutex.h"
#include "imgfuse/background_copy.h"
#include "imgfuse/bitmaps.h"
#include "imgfuse/disk.h"
#include "imgfuse/snapshots.h"
#include "layer/request_counter.h"

namespace imgfuse::layer {

/// Passes requests on to the disk that is behind it, which it borrows. A Standstill changes that one, between two
/// requests. The size stays what it is unless it is resized: a longer disk shows only its front.
///
///     mount ──► Switch ──► disk                   at most times
///               Switch ──► Changes ──► disk       while a job must know of changes
///
/// Snapshots that are opened keep the disk from being replaced until they are closed.
class Switch : public Disk {
 public:
  explicit Switch(Disk& disk);
  ~Switch() override;

  /// These too belong to the disk that is behind the switch at the time of each call.
  Snapshots* snapshots() override;
  Bitmaps* bitmaps() override;
  BackgroundCopy* background_copy() override;
  /// Of the disk that is behind the switch now, and of the requests of all times.
  DiskStatistics statistics() const override;

  /// Returns when nobody counts the allocated clusters of the disk any more: it can be closed once it was replaced.
  void wait_until_counted(const Disk& disk) EXCLUDES(counting_mutex_);
  void wait_until_counted() EXCLUDES(counting_mutex_);

 protected:
  Result<> do_close() override;

 private:
  friend class Standstill;
  class SwitchedSnapshots;
  class SwitchedBitmaps;
  class SwitchedCopy;
  class OpenSnapshot;

  DiskInfo do_info() const override;
  uint64_t do_size() const override { return size_.load(std::memory_order_relaxed); }
  Result<> do_read(GuestOffset offset, Bytes out) override;
  Result<> do_write(GuestOffset offset, ConstBytes data) override;
  Result<> do_write_zeroes(GuestRange range, Zeroing zeroing) override;
  Result<> do_populate(GuestRange range, Holes holes) override;
  Result<> do_forget(GuestRange range) override;
  Result<std::vector<Extent>> do_map(GuestRange range, size_t max_extents) override;
  Result<> do_flush() override;
  Result<> do_resize(uint64_t size, ResizeOptions options) override;
  uint64_t do_allocated() const override;
  Result<> do_count_allocated(const std::atomic<bool>& stop) override EXCLUDES(counting_mutex_);
  template <class Call>
  Result<> counted(RequestCounter& counter, uint64_t bytes, Call call);
  /// What is not to happen while a job works on the disk.
  Result<> check_no_job(const char* change) const REQUIRES_SHARED(door_);

  mutable SharedMutex door_{LockRank::door};  // who visits the disk shares it
  std::atomic<uint64_t> size_;
  std::atomic<unsigned> open_snapshots_ = 0;
  RequestCounter reads_;
  RequestCounter writes_;
  RequestCounter zeroings_;
  RequestCounter flushes_;
  const std::unique_ptr<SwitchedSnapshots> snapshots_;
  const std::unique_ptr<SwitchedBitmaps> bitmaps_;
  const std::unique_ptr<SwitchedCopy> background_copy_;

  Disk* disk_ GUARDED_BY(door_);
  std::string job_ GUARDED_BY(door_);

  bool is_counting() EXCLUDES(counting_mutex_);

  Mutex counting_mutex_;
  ConditionVariable counted_;
  const Disk* counting_ GUARDED_BY(counting_mutex_) = nullptr;
};

/// Whether the allocated clusters of the disk may be being counted during a standstill.
enum class Counting { may_go_on, has_ended };

/// The time between two requests: all before it have ended, those after it wait until it is gone. Keep it short, and
/// ask nothing of the switch meanwhile. One at a time; others wait for their turn.
class [[nodiscard]] Standstill {
 public:
  explicit Standstill(Switch& of, Counting counting = Counting::may_go_on);
  ~Standstill() NO_THREAD_SAFETY_ANALYSIS { switch_.door_.unlock(); }
  Standstill(const Standstill&) = delete;
  Standstill& operator=(const Standstill&) = delete;

  /// Requests go there from now on.
  void set_disk(Disk& disk) NO_THREAD_SAFETY_ANALYSIS { switch_.disk_ = &disk; }
  /// Who works on the disk, for messages: it is not resized, and no snapshot is applied. Empty: nobody.
  void set_job(std::string job) NO_THREAD_SAFETY_ANALYSIS { switch_.job_ = std::move(job); }
  bool has_open_snapshots() const { return switch_.open_snapshots_ > 0; }

 private:
  Switch& switch_;
};

}  // namespace imgfuse::layer
