// Copying from a backing file in the background: what is read, or all of it.
#pragma once

#include <cstdint>

namespace imgfuse {

/// How it goes about it. FVD images carry these settings.
struct CopySettings {
  bool copy_on_read = false;
  uint64_t max_outstanding_copy_on_read = 2000000;  ///< bytes that wait to be copied; what comes more is not copied
  int32_t start_delay = -1;                         ///< seconds until everything is copied; 0 or less: it is not
  uint32_t slots = 2;
  uint32_t bytes_per_prefetch = 1 << 20;
  uint32_t read_measure_time = 100;      ///< ms
  uint32_t write_measure_time = 100;     ///< ms
  uint32_t average_alpha = 80;           ///< percent, weight of the old average
  uint32_t min_read_throughput = 5120;   ///< KiB/s
  uint32_t min_write_throughput = 5120;  ///< KiB/s
  int32_t throttle_time = 30000;         ///< ms, longest pause; 0 or less: never throttle
};

/// What Disk::background_copy() gives. Any thread may call.
class BackgroundCopy {
 public:
  enum class State { waiting, running, pausing, finished, failed, off };
  struct Progress {
    State state = State::off;  ///< of copying everything
    uint64_t done = 0;         ///< bytes of the disk that are dealt with
    uint64_t total = 0;
    uint64_t copied_on_read = 0;   ///< bytes
    uint64_t skipped_on_read = 0;  ///< bytes, since too much was waiting
  };
  virtual ~BackgroundCopy() = default;
  virtual Progress progress() const = 0;
};

}  // namespace imgfuse
