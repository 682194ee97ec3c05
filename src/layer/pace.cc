#include "layer/pace.h"

#include <algorithm>

namespace imgfuse {

bool Average::add(uint64_t bytes, Milliseconds time, const std::function<bool()>& coin) {
  bytes_ += static_cast<double>(bytes);
  time_ += time.count();
  if (time_ <= measure_time_ || time_ <= 0) return false;
  const double value = bytes_ / time_;
  bytes_ = time_ = 0;
  average_ = average_ ? alpha_ * *average_ + (1 - alpha_) * value : value;
  if (*average_ >= least_) return false;
  if (coin()) return true;
  average_.reset();
  return false;
}

void Average::restart() {
  bytes_ = time_ = 0;
  average_.reset();
}

Pace::Pace(const CopySettings& settings, uint64_t rate, std::function<uint64_t(uint64_t)> random)
    : throttle_time_(settings.throttle_time),
      rate_(static_cast<double>(rate) / 1000.0),
      random_(std::move(random)),
      read_(settings.read_measure_time, settings.average_alpha, settings.min_read_throughput),
      write_(settings.write_measure_time, settings.average_alpha, settings.min_write_throughput) {}

void Pace::add_read(uint64_t bytes, Milliseconds time) {
  if (pause_ || throttle_time_ <= 0) return;
  pause_ = read_.add(bytes, time, [this] { return random_(2) == 0; });
}

void Pace::add_write(uint64_t bytes, Milliseconds time) {
  if (pause_ || throttle_time_ <= 0) return;
  pause_ = write_.add(bytes, time, [this] { return random_(2) == 0; });
}

Milliseconds Pace::wait(Milliseconds now, uint64_t next_bytes) {
  double wait = 0;
  if (pause_) {
    wait = static_cast<double>(1 + random_(static_cast<uint64_t>(throttle_time_) + 1));
    pause_ = false;
    read_.restart();
    write_.restart();
  }
  if (rate_ > 0) {
    due_ = std::max(due_, now.count());
    wait = std::max(wait, due_ - now.count());
    due_ += static_cast<double>(next_bytes) / rate_;
  }
  return Milliseconds(wait);
}

}  // namespace imgfuse
