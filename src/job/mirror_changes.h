// What requests go through while a job works on the disk.
#pragma once

#include <optional>

#include "job/mirror_job.h"
#include "layer/forwarding.h"

namespace imgfuse::job {

/// Tells a mirror or a commit of every change, writes to both sides where that is wanted, and has a backup save what is
/// about to change.
class MirrorJob::Changes final : public layer::Forwarding {
 public:
  explicit Changes(MirrorJob& job) : Forwarding(job.sides_.source), job_(job) {}

 private:
  Result<> do_write(GuestOffset offset, ConstBytes data) override {
    return change({offset, data.size()}, [&](Disk& disk) { return disk.write(offset, data); });
  }
  Result<> do_write_zeroes(GuestRange range, Zeroing zeroing) override {
    return change(range, [&](Disk& disk) { return disk.write_zeroes(range, zeroing); });
  }
  /// What the target has below it may be something else: it is told what the range reads as then.
  Result<> do_forget(GuestRange range) override {
    const auto forget = [&](Disk& disk) { return disk.forget(range); };
    return job_.is_backup() ? save_and(range, forget) : mark_after(range, forget);
  }

  template <class Change>
  Result<> change(GuestRange range, Change make) {
    if (job_.is_backup()) return save_and(range, make);
    if (!job_.options_.write_blocking || job_.enter(range) == MirrorEngine::Entry::mark) return mark_after(range, make);
    const Result<> result = make(below());
    job_.leave(range, result ? std::optional(make(job_.target_)) : std::nullopt);
    return result;
  }
  template <class Change>
  Result<> save_and(GuestRange range, Change make) {
    job_.save(range);
    const Result<> result = make(below());
    if (job_.increment_) job_.increment_->add(range);
    return result;
  }
  template <class Change>
  Result<> mark_after(GuestRange range, Change make) {
    const Result<> result = make(below());
    job_.changed(range);
    return result;
  }

  MirrorJob& job_;
};

}  // namespace imgfuse::job
