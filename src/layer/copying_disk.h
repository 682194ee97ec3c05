// A disk whose backing file is copied into it in the background: what is read, or everything.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <thread>

#include "base/mutex.h"
#include "imgfuse/background_copy.h"
#include "imgfuse/disk.h"
#include "layer/forwarding.h"
#include "layer/pace.h"

namespace imgfuse {

/// Time, and waiting that can be cut short. Tests have their own.
class CopyClock {
 public:
  virtual ~CopyClock() = default;
  virtual Milliseconds now() = 0;
  /// Returns when the time is over, or soon after interrupt().
  virtual void wait(Milliseconds time) = 0;
  virtual void interrupt() = 0;
  static std::unique_ptr<CopyClock> steady();
};

struct CopyOptions {
  CopySettings settings;                          ///< copy_on_read, and how to copy everything
  bool everything = false;                        ///< copy the whole backing file
  uint64_t rate = 0;                              ///< bytes per second of that; 0: no limit but the settings' throttle
  std::function<uint64_t(uint64_t)> random = {};  ///< random(n): a number below n
};

/// Passes every request on. Two threads of its own call populate(): one for what was read, and one that walks the disk.
/// A reader never waits for them: what it read is noted, and dropped if too much is waiting. Copying does not change
/// what the disk reads as, so an error ends the copying and nothing else.
class CopyingDisk final : public layer::Forwarding, private BackgroundCopy {
 public:
  CopyingDisk(std::unique_ptr<Disk> disk, CopyOptions options, std::unique_ptr<CopyClock> clock = CopyClock::steady());
  ~CopyingDisk() override;

  BackgroundCopy* background_copy() override { return this; }
  /// Until all that was noted is copied; for tests.
  void wait_idle() EXCLUDES(mutex_);

 private:
  Result<> do_read(GuestOffset offset, Bytes out) override;
  Result<> do_close() override;

  Progress progress() const override EXCLUDES(mutex_);

  void note_read(GuestRange range) EXCLUDES(mutex_);
  void copy_noted() EXCLUDES(mutex_);
  void copy_everything() EXCLUDES(mutex_);
  Result<bool> copy_piece(GuestOffset& cursor, Pace& pace);
  Result<bool> pass_hole(GuestRange hole, GuestOffset& cursor);
  Result<Extent> next_below(GuestRange range);
  void set_state(State state) EXCLUDES(mutex_);
  void stop() EXCLUDES(mutex_);

  const std::unique_ptr<Disk> disk_;
  const CopyOptions options_;
  const std::unique_ptr<CopyClock> clock_;

  std::atomic<bool> stopping_ = false;
  mutable Mutex mutex_;
  ConditionVariable changed_;
  std::deque<GuestRange> noted_ GUARDED_BY(mutex_);
  uint64_t waiting_ GUARDED_BY(mutex_) = 0;  // bytes, of what is noted and what is being copied
  Progress progress_ GUARDED_BY(mutex_);
  std::thread on_read_, everything_;
};

}  // namespace imgfuse
