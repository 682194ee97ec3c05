// Claims that end a fuzz target when they are not true.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "byte_storage.h"
#include "imgfuse/check.h"

namespace imgfuse::fuzz {

inline void require(bool holds, const char* claim) {
  if (holds) return;
  std::fprintf(stderr, "not true: %s\n", claim);
  std::abort();
}

/// What a repair in `mode` reports as left is what a check finds. `check` is a format's.
template <class Check>
void require_honest_repair(ConstBytes image, Repair mode, Check check) {
  ByteStorage storage(image);
  const auto report = check(storage, mode, CheckSink{});
  if (!report || mode == Repair::none) return;
  const auto again = check(storage, Repair::none, CheckSink{});
  require(again && again->corruptions == report->corruptions && again->leaks == report->leaks,
          "what a repair reports as left is what a check finds");
}

}  // namespace imgfuse::fuzz
