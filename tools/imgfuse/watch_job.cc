#include "watch_job.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "control/jobs_json.h"

namespace imgfuse::tool {
namespace {

using Clock = std::chrono::steady_clock;

/// A job that is over is noticed after 3 % of the time that it took, so that short ones do not seem long.
Clock::duration time_to_next_look(Clock::time_point begin) {
  return std::clamp<Clock::duration>((Clock::now() - begin) / 32, std::chrono::milliseconds(1),
                                     std::chrono::milliseconds(50));
}

volatile sig_atomic_t interrupted_once = 0;

Result<JobStatus> status_of(control::Client& daemon, uint64_t id) {
  IMG_LET(const control::Json list, daemon.call("jobs"));
  for (const control::Json& json : list)
    if (const JobStatus job = control::job_from_json(json); job.id == id) return job;
  return fail(ErrorCode::not_found, "there is no job {}", id);
}

bool is_enough(const JobStatus& job, WatchUntil until) {
  if (is_over(job.state)) return true;
  if (job.state == JobState::paused && job.error) return true;
  return job.state == JobState::ready && until == WatchUntil::ready;
}

}  // namespace

Interruptions::Interruptions() {
  struct sigaction notice = {};
  notice.sa_handler = [](int) { interrupted_once = 1; };
  notice.sa_flags = static_cast<int>(SA_RESETHAND);
  for (size_t i = 0; i < kSignals.size(); ++i) {
    ::sigaction(kSignals[i], &notice, &before_[i]);
    if (before_[i].sa_handler == SIG_IGN) ::sigaction(kSignals[i], &before_[i], nullptr);  // as nohup wants it
  }
}

Interruptions::~Interruptions() {
  for (size_t i = 0; i < kSignals.size(); ++i) ::sigaction(kSignals[i], &before_[i], nullptr);
  interrupted_once = 0;
}

bool Interruptions::any() const { return interrupted_once != 0; }

Result<JobStatus> watch_job(control::Client& daemon, uint64_t job, WatchUntil until, const Interruptions& interruptions,
                            IfInterrupted interrupted, Io& io, ShowProgress show) {
  ProgressBar bar(io, show);
  const Progress progress = bar.all();
  const auto begin = Clock::now();
  bool cancelled = false;
  while (true) {
    IMG_LET(const JobStatus status, status_of(daemon, job));
    if (progress) progress(status.copied, status.copied + status.remaining);
    if (is_enough(status, cancelled ? WatchUntil::over : until)) return status;
    if (interruptions.any() && interrupted == IfInterrupted::leave) return status;
    if (interruptions.any() && !cancelled) {
      cancelled = true;
      (void)daemon.call("job-cancel", {{"job", job}});  // or it is over
    }
    std::this_thread::sleep_for(time_to_next_look(begin));
  }
}

Result<> outcome_of(const JobStatus& job) {
  const bool matters = is_over(job.state) || job.state == JobState::paused;
  if (matters && job.error) return fail(*job.error);
  if (job.state == JobState::cancelled) return fail(ErrorCode::invalid, "job {} was cancelled", job.id);
  return {};
}

}  // namespace imgfuse::tool
