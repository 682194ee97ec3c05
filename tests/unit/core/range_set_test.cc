#include "core/range_set.h"

#include <doctest/doctest.h>

#include <set>

#include "support/random.h"

namespace imgfuse::test {

TEST_CASE("range set: does what a set of numbers does") {
  Rng rng(base_seed());
  RangeSet ranges;
  std::set<uint64_t> numbers;
  for (uint64_t i = 0; i < from_environment("IMG_RUNS", 3000); ++i) {
    INFO("IMG_SEED=" << base_seed() << ", step " << i);
    const uint64_t first = rng.below(64), last = first + rng.below(9);
    if (rng.one_in(2)) {
      ranges.add(first, last);
      for (uint64_t n = first; n < last; ++n) numbers.insert(n);
    } else {
      ranges.remove(first, last);
      for (uint64_t n = first; n < last; ++n) numbers.erase(n);
    }
    REQUIRE(ranges.numbers() == numbers.size());
    REQUIRE(ranges.empty() == numbers.empty());
    std::set<uint64_t> listed;
    uint64_t behind = 0;
    for (const auto& [begin, end] : ranges) {
      REQUIRE(begin < end);
      REQUIRE((listed.empty() || begin > behind));  // neighbours are one
      for (uint64_t n = begin; n < end; ++n) listed.insert(n);
      behind = end;
    }
    REQUIRE(listed == numbers);

    const uint64_t from = rng.below(64), to = from + rng.below(9);
    const auto found = ranges.overlap(from, to);
    const auto wanted = numbers.lower_bound(from);
    REQUIRE(found.has_value() == (wanted != numbers.end() && *wanted < to));
    if (!found) continue;
    REQUIRE(found->first == *wanted);
    for (uint64_t n = found->first; n < found->second; ++n) REQUIRE((n < to && numbers.contains(n)));
    REQUIRE((found->second == to || !numbers.contains(found->second)));
  }
}

TEST_CASE("range set: an empty range overlaps nothing, also inside a range") {
  RangeSet ranges;
  ranges.add(10, 20);

  CHECK_FALSE(ranges.overlap(15, 15));
  CHECK(ranges.overlap(15, 16));
}

}  // namespace imgfuse::test
