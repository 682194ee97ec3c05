// What a disk has done since it was opened.
#pragma once

#include <array>
#include <cstdint>

namespace imgfuse {

/// Requests of one kind.
struct RequestStatistics {
  uint64_t requests = 0;
  uint64_t failed = 0;
  uint64_t bytes = 0;  ///< asked for
  /// By how long they took: the i-th counts those of less than 2^i microseconds that took no less than 2^(i-1), the
  /// last one all that took longer too.
  std::array<uint64_t, 24> latencies = {};
};

/// Counters that a disk does not have stay 0.
struct DiskStatistics {
  RequestStatistics reads;
  RequestStatistics writes;
  RequestStatistics zeroings;  ///< discards too
  RequestStatistics flushes;

  uint64_t table_hits = 0;       ///< tables asked for that were in memory
  uint64_t table_loads = 0;      ///< and those that were not
  uint64_t table_evictions = 0;  ///< tables that made room for others
  uint64_t tables = 0;           ///< in memory now
  uint64_t dirty_tables = 0;     ///< of these, changed and not written
  uint64_t cluster_hits = 0;     ///< compressed clusters asked for that were in memory
  uint64_t clusters_inflated = 0;
  uint64_t flush_cycles = 0;
  uint64_t quarantine = 0;  ///< bytes that are free as soon as what un-mapped them is durable
};

}  // namespace imgfuse
