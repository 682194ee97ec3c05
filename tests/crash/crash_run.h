// A disk that loses power at every moment.
#pragma once

#include "scenario.h"

namespace imgfuse::test {

struct Totals {
  uint64_t states = 0;
  uint64_t confirmed = 0;  ///< by qemu-img
  uint64_t dirty = 0;      ///< with postponed counts
  uint64_t counted_ahead = 0;
};

/// Works on the scenario's disk until so many crashed images were looked at, and adds to the totals. Each must check
/// clean but for leaks, open, and read as the model allows; else the test has failed.
void crash_often(const Scenario& scenario, const TemporaryDirectory& directory, uint64_t seed, uint64_t states,
                 Totals& totals);

}  // namespace imgfuse::test
