// Waiting for a job in a daemon.
#pragma once

#include <signal.h>

#include <array>
#include <string>

#include "control/client.h"
#include "imgfuse/jobs.h"
#include "progress.h"

namespace imgfuse::tool {

/// Until when a job is watched.
enum class WatchUntil { ready, over };
/// What becomes of the job when the one who watches it is interrupted (SIGINT, SIGTERM, SIGHUP).
enum class IfInterrupted { cancel, leave };

/// While one lives, the first of each signal that would end the process is noticed; the second ends it. Who starts a
/// job that he will watch makes one before: an interruption finds a watcher then, however early it comes. One at a
/// time.
class Interruptions {
 public:
  Interruptions();
  ~Interruptions();
  Interruptions(const Interruptions&) = delete;
  Interruptions& operator=(const Interruptions&) = delete;

  bool any() const;

 private:
  static constexpr std::array<int, 3> kSignals = {SIGINT, SIGTERM, SIGHUP};
  std::array<struct sigaction, 3> before_;
};

/// Shows the progress, and returns the job's status when it is ready or over, paused by an error, or cancelled by an
/// interruption.
Result<JobStatus> watch_job(control::Client& daemon, uint64_t job, WatchUntil until, const Interruptions& interruptions,
                            IfInterrupted interrupted, Io& io, ShowProgress show);

/// The job's own error; one that says so if it was cancelled; nothing if all went well so far.
Result<> outcome_of(const JobStatus& job);

}  // namespace imgfuse::tool
