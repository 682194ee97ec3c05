// How fast the background may go: FVD's adaptive throttle, and a plain limit.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>

#include "imgfuse/background_copy.h"

namespace imgfuse {

using Milliseconds = std::chrono::duration<double, std::milli>;

/// What measurements of one kind of operation say.
///
/// Bytes and times of finished operations are summed up. When the times reach the measuring time they make one value,
/// and values a moving average. Below the least throughput a coin decides: pause, or forget the average and go on, so
/// that disks that compete do not pause in step.
class Average {
 public:
  /// `alpha`: percent of the old average in the new one; `least`: KiB per second.
  Average(uint32_t measure_time, uint32_t alpha, uint32_t least)
      : measure_time_(measure_time), alpha_(alpha / 100.0), least_(least * 1024.0 / 1000.0) {}

  /// Whether a pause is asked for.
  bool add(uint64_t bytes, Milliseconds time, const std::function<bool()>& coin);
  void restart();
  std::optional<double> bytes_per_ms() const { return average_; }

 private:
  const double measure_time_, alpha_, least_;
  double bytes_ = 0, time_ = 0;
  std::optional<double> average_;
};

/// Reads and writes of one disk's background copying.
class Pace {
 public:
  /// `random(n)`: a number below n. `rate`: bytes per second, 0: no limit.
  Pace(const CopySettings& settings, uint64_t rate, std::function<uint64_t(uint64_t)> random);

  void add_read(uint64_t bytes, Milliseconds time);
  void add_write(uint64_t bytes, Milliseconds time);
  /// How long to wait before the next piece, which comes `now`; begins a new measurement after a pause.
  Milliseconds wait(Milliseconds now, uint64_t next_bytes);
  bool wants_pause() const { return pause_; }
  /// Whether speeds are asked for.
  bool measures() const { return throttle_time_ > 0; }

 private:
  const int64_t throttle_time_;
  const double rate_;  // bytes per ms
  const std::function<uint64_t(uint64_t)> random_;
  Average read_, write_;
  bool pause_ = false;
  double due_ = 0;  // when the next piece may begin, at this rate
};

}  // namespace imgfuse
