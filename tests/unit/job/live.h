// A disk with jobs, for tests that wait for them.
#pragma once

#include <thread>

#include "imgfuse/jobs.h"
#include "mirrors.h"

namespace imgfuse::test {

inline constexpr uint64_t kSize = 4_MiB;

/// A disk with jobs, and one target that stays open when its mirror has closed it.
class Live {
 public:
  Live(JobDisk source, JobDisk target) : source_(std::move(source)), target_(std::move(target)) {
    disk_ = with_jobs(std::make_unique<Lent>(*source_),
                      [this](const std::string& path, const auto&) { return open(path); });
  }
  ~Live() {
    if (disk_) (void)disk_->close();
  }

  Disk& operator*() { return *disk_; }
  Disk* operator->() { return disk_.get(); }
  Jobs& jobs() { return *disk_->jobs(); }
  JobDisk& source() { return source_; }
  JobDisk& target() { return target_; }
  Result<> close() { return std::exchange(disk_, nullptr)->close(); }
  bool source_closed() const { return source_closed_; }
  bool target_closed() const { return target_closed_; }

  /// Onto a target that is new.
  uint64_t mirror(JobOptions options = {}) {
    options.target_is_zero = true;
    return start(options);
  }
  uint64_t start(JobOptions options) {
    options.target = "target";
    return must(jobs().start(options));
  }
  JobStatus status() { return jobs().list().back(); }
  /// Polls until the job is in this state, or over; its status then.
  JobStatus wait(JobState state) {
    for (;;) {
      const JobStatus status = this->status();
      if (status.state == state || is_over(status.state)) return status;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

 private:
  /// Is closed without the disk below it.
  class Lent final : public layer::Forwarding {
   public:
    explicit Lent(Disk& below, std::atomic<bool>* closed = nullptr) : Forwarding(below), closed_(closed) {}

   private:
    Result<> do_close() override {
      if (closed_ != nullptr) *closed_ = true;
      return below().flush();
    }
    std::atomic<bool>* closed_;
  };
  Result<JobTarget> open(const std::string& path) {
    if (path != "target") return fail(ErrorCode::not_found, "{}: no such file", path);
    return JobTarget{std::make_unique<Lent>(*target_, &target_closed_), false};
  }

  JobDisk source_;
  JobDisk target_;
  std::atomic<bool> source_closed_ = false;
  std::atomic<bool> target_closed_ = false;
  std::unique_ptr<Disk> disk_;
};

inline JobDisk filled(const Kind& kind) {
  JobDisk disk = kind.make(kSize);
  Rng rng(base_seed());
  scribble(*disk, rng, 20);
  return disk;
}

}  // namespace imgfuse::test
