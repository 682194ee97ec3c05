// Counting requests of one kind, by many threads at once.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>

#include "base/per_cpu.h"
#include "imgfuse/statistics.h"

namespace imgfuse::layer {

/// Any thread may call.
class RequestCounter {
 public:
  void add(uint64_t bytes, bool good, std::chrono::steady_clock::duration took) {
    const auto us = static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(took).count());
    Counts& counts = counts_.here();
    const size_t bucket = std::min<size_t>(static_cast<size_t>(std::bit_width(us)), counts.latencies.size() - 1);
    counts.latencies[bucket].fetch_add(1, std::memory_order_relaxed);
    counts.bytes.fetch_add(bytes, std::memory_order_relaxed);
    if (!good) counts.failed.fetch_add(1, std::memory_order_relaxed);
  }
  RequestStatistics get() const {
    RequestStatistics sum;
    counts_.for_each([&](const Counts& counts) {
      for (size_t i = 0; i < counts.latencies.size(); ++i) {
        const uint64_t requests = counts.latencies[i].load(std::memory_order_relaxed);
        sum.requests += requests;
        sum.latencies[i] += requests;
      }
      sum.bytes += counts.bytes.load(std::memory_order_relaxed);
      sum.failed += counts.failed.load(std::memory_order_relaxed);
    });
    return sum;
  }

 private:
  struct Counts {
    std::array<std::atomic<uint64_t>, RequestStatistics{}.latencies.size()> latencies = {};
    std::atomic<uint64_t> bytes = 0;
    std::atomic<uint64_t> failed = 0;
  };
  PerCpu<Counts> counts_;
};

}  // namespace imgfuse::layer
