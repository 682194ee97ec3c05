// What those who change the disk do for the job.
#include "job/mirror_changes.h"

namespace imgfuse::job {
namespace {

/// Changes to a mirror that had nothing to do are gathered for so long: a busy guest wakes nobody with each write.
constexpr std::chrono::milliseconds kGathering(20);

}  // namespace

void MirrorJob::changed(GuestRange range) {
  const Lock lock(mutex_);
  if (engine_->remaining() == 0) engine_->hold_until(now() + kGathering);
  engine_->mark(range);
  if (idle_ == options_.in_flight) work_.notify_one();
}

/// What cannot be copied before it changes is lost to the backup, which fails then under any policy.
void MirrorJob::save(GuestRange range) {
  Lock lock(mutex_);
  while (!is_ending()) {
    const MirrorEngine::Claim claim = engine_->claim(range, now());
    if (claim.operation == nullptr && !claim.wait) return;
    if (claim.wait) {
      ++waiting_;
      changed_.wait(lock);
      --waiting_;
      continue;
    }
    lock.unlock();
    const Result<> copied = copy(*claim.operation);
    lock.lock();
    engine_->finished(*claim.operation, copied.has_value());
    if (!copied) {
      error_ = copied.error();
      set_state(JobState::failed);
    }
    if (idle_ > 0) work_.notify_one();
    changed_.notify_all();
  }
}

MirrorEngine::Entry MirrorJob::enter(GuestRange range) {
  Lock lock(mutex_);
  if (!surveyed_ || is_ending()) return MirrorEngine::Entry::mark;
  for (;;) {
    const MirrorEngine::Entry entry = engine_->enter(range);
    if (entry != MirrorEngine::Entry::wait) return entry;
    ++waiting_;
    changed_.wait(lock);
    --waiting_;
  }
}

void MirrorJob::leave(GuestRange range, const std::optional<Result<>>& target) {
  const Lock lock(mutex_);
  engine_->leave(range, target && *target);
  if (target && !*target) failed(target->error());
  if (waiting_ > 0) changed_.notify_all();
  if (idle_ > 0) work_.notify_one();
}

}  // namespace imgfuse::job
