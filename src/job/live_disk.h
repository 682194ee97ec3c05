// A disk with the jobs that work on it.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "imgfuse/jobs.h"
#include "job/mirror_job.h"
#include "layer/switch.h"

namespace imgfuse::job {

/// Keeps the disk that is served, and starts and remembers jobs. A stream and a commit close it, in a standstill, and
/// open the image again in another way; should that fail, there is a disk that has nothing but the error.
class LiveDisk final : public layer::Switch, private Jobs {
 public:
  LiveDisk(std::unique_ptr<Disk> disk, OpenTarget open_target, std::shared_ptr<ImageChain> chain)
      : Switch(*disk), open_target_(std::move(open_target)), chain_(std::move(chain)), disk_(std::move(disk)) {}

  Jobs* jobs() override { return this; }
  /// Not while there is a job, nor are there jobs from then on: they have to know of each write.
  int share_host_file() override EXCLUDES(mutex_);

 private:
  Result<uint64_t> start(const JobOptions& options) override;
  std::vector<JobStatus> list() const override;
  Result<> pause(uint64_t job) override {
    return with(job, [](MirrorJob& j) { return j.pause(); });
  }
  Result<> resume(uint64_t job) override {
    return with(job, [](MirrorJob& j) { return j.resume(); });
  }
  Result<> set_rate(uint64_t job, uint64_t rate) override {
    return with(job, [&](MirrorJob& j) { return j.set_rate(rate); });
  }
  Result<> cancel(uint64_t job) override {
    return with(job, [](MirrorJob& j) { return j.cancel(); });
  }
  Result<> complete(uint64_t job) override {
    return with(job, [](MirrorJob& j) { return j.end_when_ready(WhenReady::complete); });
  }
  Result<> finish(uint64_t job) override {
    return with(job, [](MirrorJob& j) { return j.end_when_ready(WhenReady::finish); });
  }
  void set_hooks(JobHooks hooks) override { hooks_ = std::move(hooks); }
  void end() override;
  Result<> do_close() override;

  Result<> with(uint64_t id, const std::function<Result<>(MirrorJob&)>& call) const EXCLUDES(mutex_);
  std::shared_ptr<MirrorJob> current() const EXCLUDES(mutex_);
  Result<> begin_starting() EXCLUDES(mutex_);
  void end_starting() EXCLUDES(mutex_);
  Result<uint64_t> start_job(JobOptions options);
  void remember(std::shared_ptr<MirrorJob> job) EXCLUDES(mutex_);
  std::unique_ptr<Disk> adopt(std::unique_ptr<Disk> disk) EXCLUDES(mutex_);
  Disk& served() const EXCLUDES(mutex_);

  // live_sides.cc
  Result<MirrorJob::Sides> sides_for(JobOptions& options);
  Result<MirrorJob::Sides> sides_of_copy(const JobOptions& options);
  Result<MirrorJob::Sides> sides_of_stream(JobOptions& options);
  Result<MirrorJob::Sides> sides_of_commit(JobOptions& options);
  Result<> check_chain() const;
  Result<> serve_above(const BackingLayer& base, std::unique_ptr<Disk>& base_disk);
  Result<> give_base(layer::Standstill& standstill, const std::optional<BackingLayer>& base);
  Result<> give_way(layer::Standstill& standstill, const BackingLayer& base, std::unique_ptr<Disk>& base_disk);
  void give_up(layer::Standstill& standstill, std::unique_ptr<Disk> base_disk);
  void reopen(layer::Standstill& standstill, const DiskInfo& image);

  const OpenTarget open_target_;
  const std::shared_ptr<ImageChain> chain_;
  JobHooks hooks_;
  std::unique_ptr<Disk> below_;  // what the disk stands on after a commit that could not be undone

  mutable Mutex mutex_;
  ConditionVariable started_;
  std::unique_ptr<Disk> disk_ GUARDED_BY(mutex_);
  std::shared_ptr<MirrorJob> job_ GUARDED_BY(mutex_);  // the last one
  bool starting_ GUARDED_BY(mutex_) = false;           // another one
  bool closed_ GUARDED_BY(mutex_) = false;
  bool shared_ GUARDED_BY(mutex_) = false;
  uint64_t last_id_ GUARDED_BY(mutex_) = 0;
  std::deque<JobStatus> over_ GUARDED_BY(mutex_);
};

}  // namespace imgfuse::job
