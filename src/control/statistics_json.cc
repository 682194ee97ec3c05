#include "control/statistics_json.h"

namespace imgfuse::control {
namespace {

/// The histogram ends with the last bucket that is not empty.
Json to_json(const RequestStatistics& statistics) {
  size_t used = statistics.latencies.size();
  while (used > 0 && statistics.latencies[used - 1] == 0) --used;
  Json latencies = Json::array();
  for (size_t i = 0; i < used; ++i)
    latencies.push_back({{"below-us", uint64_t{1} << i}, {"requests", statistics.latencies[i]}});
  return {{"requests", statistics.requests},
          {"failed", statistics.failed},
          {"bytes", statistics.bytes},
          {"latencies", std::move(latencies)}};
}

}  // namespace

Json to_json(const DiskStatistics& statistics) {
  return {{"reads", to_json(statistics.reads)},
          {"writes", to_json(statistics.writes)},
          {"zeroings", to_json(statistics.zeroings)},
          {"flushes", to_json(statistics.flushes)},
          {"table-hits", statistics.table_hits},
          {"table-loads", statistics.table_loads},
          {"table-evictions", statistics.table_evictions},
          {"tables", statistics.tables},
          {"dirty-tables", statistics.dirty_tables},
          {"cluster-hits", statistics.cluster_hits},
          {"clusters-inflated", statistics.clusters_inflated},
          {"flush-cycles", statistics.flush_cycles},
          {"quarantine", statistics.quarantine}};
}

uint64_t latency_of_share(const Json& requests, double share) {
  const double wanted = share * requests.at("requests").get<double>();
  double counted = 0;
  for (const Json& bucket : requests.at("latencies")) {
    counted += bucket.at("requests").get<double>();
    if (counted >= wanted) return bucket.at("below-us");
  }
  return 0;
}

}  // namespace imgfuse::control
