#include "progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <ostream>
#include <string>

namespace imgfuse::tool {
namespace {

constexpr auto kInterval = std::chrono::milliseconds(100);
constexpr size_t kWidth = 40;

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
  last_ = now;
  drawn_ = true;
  const double share = total == 0 ? 1 : static_cast<double>(done) / static_cast<double>(total);
  const auto filled = static_cast<size_t>(share * static_cast<double>(kWidth));
  err_ << fmt::format("\r[{}{}] {:5.1f} %", std::string(filled, '#'), std::string(kWidth - filled, ' '), 100 * share)
       << std::flush;
}

}  // namespace imgfuse::tool
