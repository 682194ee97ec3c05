#include "job/live_disk.h"

namespace imgfuse {
namespace job {
namespace {

/// How many jobs that are over are remembered.
constexpr size_t kMemory = 16;

}  // namespace

std::shared_ptr<MirrorJob> LiveDisk::current() const {
  const Lock lock(mutex_);
  return job_;
}

Result<> LiveDisk::begin_starting() {
  const auto job = current();
  if (job && !is_over(job->status().state))
    return fail(ErrorCode::busy, "job {}, a {} to {}, works on this disk: one at a time", job->id(), job->status().kind,
                job->status().target);
  const Lock lock(mutex_);
  if (closed_) return fail(ErrorCode::busy, "the disk is being unmounted");
  if (starting_ || job_ != job) return fail(ErrorCode::busy, "another job is being started");
  if (shared_)
    return fail(ErrorCode::unsupported,
                "the kernel reads and writes {} by itself: for jobs, mount it without -o passthrough",
                disk_->info().name);
  starting_ = true;
  return {};
}

Result<uint64_t> LiveDisk::start(const JobOptions& options) {
  IMG_TRY(job::check_options(options, size()));
  IMG_TRY(begin_starting());
  auto id = start_job(options);
  end_starting();
  return id;
}

void LiveDisk::end_starting() {
  const Lock lock(mutex_);
  starting_ = false;
  started_.notify_all();
}

Result<uint64_t> LiveDisk::start_job(JobOptions options) {
  if (auto last = current()) remember(std::move(last));
  IMG_LET(MirrorJob::Sides sides, sides_for(options));
  uint64_t id = 0;
  {
    const Lock lock(mutex_);
    id = ++last_id_;
  }
  auto job = std::make_shared<MirrorJob>(id, options, std::move(sides));
  IMG_TRY(job->start());
  const Lock lock(mutex_);
  job_ = std::move(job);
  return id;
}

int LiveDisk::share_host_file() {
  if (!begin_starting()) return -1;
  const int file = served().share_host_file();
  {
    const Lock lock(mutex_);
    shared_ = file >= 0;
  }
  end_starting();
  return file;
}

/// What is over gives its memory back.
void LiveDisk::remember(std::shared_ptr<MirrorJob> job) {
  job->join();
  const JobStatus status = job->status();
  const Lock lock(mutex_);
  over_.push_back(status);
  if (over_.size() > kMemory) over_.pop_front();
  job_.reset();
}

std::unique_ptr<Disk> LiveDisk::adopt(std::unique_ptr<Disk> disk) {
  const Lock lock(mutex_);
  return std::exchange(disk_, std::move(disk));
}

Disk& LiveDisk::served() const {
  const Lock lock(mutex_);
  return *disk_;
}

std::vector<JobStatus> LiveDisk::list() const {
  std::vector<JobStatus> list;
  std::shared_ptr<MirrorJob> job;
  {
    const Lock lock(mutex_);
    list.assign(over_.begin(), over_.end());
    job = job_;
  }
  if (job) list.push_back(job->status());
  return list;
}

Result<> LiveDisk::with(uint64_t id, const std::function<Result<>(MirrorJob&)>& call) const {
  const auto job = current();
  if (job && job->id() == id) return call(*job);
  const Lock lock(mutex_);
  for (const JobStatus& status : over_)
    if (status.id == id) return fail(ErrorCode::invalid, "job {} is over", id);
  return fail(ErrorCode::not_found, "there is no job {}", id);
}

void LiveDisk::end() {
  std::shared_ptr<MirrorJob> job;
  {
    Lock lock(mutex_);
    closed_ = true;
    while (starting_) started_.wait(lock);
    job = job_;
  }
  if (job) {
    (void)job->cancel();  // or it is over
    job->join();
  }
}

Result<> LiveDisk::do_close() {
  end();
  const Result<> closed = Switch::do_close();
  const Result<> below = below_ ? below_->close() : Result<>();
  return closed ? below : closed;
}

}  // namespace job

std::unique_ptr<Disk> with_jobs(std::unique_ptr<Disk> disk, OpenTarget open_target, std::shared_ptr<ImageChain> chain) {
  return std::make_unique<job::LiveDisk>(std::move(disk), std::move(open_target), std::move(chain));
}

}  // namespace imgfuse
