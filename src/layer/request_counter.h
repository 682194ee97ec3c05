// Counting requests of one kind, by many threads at once.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>

#include "imgfuse/statistics.h"

namespace imgfuse::layer {

/// Any thread may call. Its own cache lines, so that readers and writers do not slow each other.
class alignas(64) RequestCounter {
 public:
  void add(uint64_t bytes, bool good, std::chrono::steady_clock::duration took) {
    const auto us = static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(took).count());
    const size_t bucket = std::min<size_t>(static_cast<size_t>(std::bit_width(us)), latencies_.size() - 1);
    latencies_[bucket].fetch_add(1, std::memory_order_relaxed);
    bytes_.fetch_add(bytes, std::memory_order_relaxed);
    if (!good) failed_.fetch_add(1, std::memory_order_relaxed);
  }
  RequestStatistics get() const {
    RequestStatistics statistics;
    for (size_t i = 0; i < latencies_.size(); ++i)
      statistics.requests += statistics.latencies[i] = latencies_[i].load(std::memory_order_relaxed);
    statistics.bytes = bytes_.load(std::memory_order_relaxed);
    statistics.failed = failed_.load(std::memory_order_relaxed);
    return statistics;
  }

 private:
  std::array<std::atomic<uint64_t>, RequestStatistics{}.latencies.size()> latencies_ = {};
  std::atomic<uint64_t> bytes_ = 0;
  std::atomic<uint64_t> failed_ = 0;
};

}  // namespace imgfuse::layer
