// How far a job is, for those who watch.
#pragma once

#include <chrono>
#include <iosfwd>

#include "command.h"
#include "imgfuse/job.h"

namespace imgfuse::tool {

/// When to show progress: if somebody looks at stderr, always (-p), or never (-q).
enum class ShowProgress { on_terminal, always, never };

/// One line on `err` that is written again and again: the share, the rate, what is left, and how long that may take.
class ProgressBar {
 public:
  ProgressBar(Io& io, ShowProgress show);
  /// Ends the line.
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  /// What a job calls; it must not outlive the bar. The job does the part of the whole from `before` on.
  Progress part(uint64_t before, uint64_t whole);
  Progress all() { return part(0, 0); }

 private:
  void show(uint64_t done, uint64_t total);

  std::ostream& err_;
  const bool shown_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point begin_;
  uint64_t done_at_begin_ = 0;
  std::chrono::steady_clock::time_point last_;
};

}  // namespace imgfuse::tool
