// What a disk has done, as the control socket tells it.
#pragma once

#include "control/protocol.h"
#include "imgfuse/statistics.h"

namespace imgfuse::control {

Json to_json(const DiskStatistics& statistics);
/// The time in microseconds below which this share (0 to 1) of the requests lies, as far as the histogram of to_json()
/// tells it; 0 without requests.
uint64_t latency_of_share(const Json& requests, double share);

}  // namespace imgfuse::control
