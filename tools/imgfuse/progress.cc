#include "progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <ostream>
#include <string>

#include "text.h"

namespace imgfuse::tool {
namespace {

constexpr auto kInterval = std::chrono::milliseconds(100);
constexpr size_t kWidth = 30;
/// Before that a rate means nothing.
constexpr double kShortest = 0.5;

/// "312 MiB/s, 1.2 GiB left, 0:04"
std::string describe(uint64_t done, uint64_t left, double seconds) {
  if (seconds < kShortest || done == 0) return fmt::format("{} left", human_size(left));
  const double rate = static_cast<double>(done) / seconds;
  const auto rest = static_cast<uint64_t>(static_cast<double>(left) / rate);
  return fmt::format("{}/s, {} left, {}:{:02}", human_size(static_cast<uint64_t>(rate)), human_size(left), rest / 60,
                     rest % 60);
}

}  // namespace

ProgressBar::ProgressBar(Io& io, ShowProgress show)
    : err_(io.err),
      shown_(show == ShowProgress::always || (show == ShowProgress::on_terminal && isatty(STDERR_FILENO))) {}

ProgressBar::~ProgressBar() {
  if (drawn_) err_ << '\n' << std::flush;
}

Progress ProgressBar::part(uint64_t before, uint64_t whole) {
  if (!shown_) return {};
  return [this, before, whole](uint64_t done, uint64_t total) { show(before + done, whole == 0 ? total : whole); };
}

void ProgressBar::show(uint64_t done, uint64_t total) {
  const auto now = std::chrono::steady_clock::now();
  if (done < total && drawn_ && now - last_ < kInterval) return;
  if (!drawn_) {
    begin_ = now;
    done_at_begin_ = std::min(done, total);
  }
  last_ = now;
  drawn_ = true;
  const double share = total == 0 ? 1 : static_cast<double>(done) / static_cast<double>(total);
  const auto filled = static_cast<size_t>(share * static_cast<double>(kWidth));
  const double seconds = std::chrono::duration<double>(now - begin_).count();
  const std::string rest = describe(done - std::min(done, done_at_begin_), total - std::min(done, total), seconds);
  err_ << fmt::format("\r[{:<{}}] {:5.1f} %  {:<40}", std::string(filled, '#'), kWidth, 100 * share, rest)
       << std::flush;
}

}  // namespace imgfuse::tool
