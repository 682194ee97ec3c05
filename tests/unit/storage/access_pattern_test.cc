#include "storage/access_pattern.h"

#include <doctest/doctest.h>

#include <random>

#include "imgfuse/units.h"

namespace imgfuse::test {
namespace {

constexpr size_t kRead = 4096;

/// How many of `count` reads count as scattered; `next` says where each begins.
template <class Next>
int scattered(AccessPattern& pattern, int count, Next next) {
  int sum = 0;
  for (int i = 0; i < count; ++i) sum += pattern.note(next(i), kRead) ? 1 : 0;
  return sum;
}

uint64_t in_order(int i) { return static_cast<uint64_t>(i) * kRead; }

TEST_CASE("access pattern: reads all over a large file are scattered, one behind the other they are not") {
  std::mt19937_64 random(1);
  const auto anywhere = [&](int) { return random() % (1_GiB / kRead) * kRead; };
  AccessPattern pattern;
  CHECK(scattered(pattern, 1000, in_order) == 0);
  CHECK(scattered(pattern, 4, anywhere) == 0);  // a few jumps are nothing yet
  CHECK(scattered(pattern, 1000, anywhere) > 980);
  CHECK(scattered(pattern, 1000, in_order) < 10);
  CHECK(scattered(pattern, 1000, anywhere) > 980);
  CHECK(scattered(pattern, 1000, [](int) { return 3_GiB; }) == 1000);  // one that is tried again is one
  CHECK(scattered(pattern, 1000, in_order) < 10);
  CHECK(scattered(pattern, 10, [](int i) { return 1_GiB - 3 * i * kRead; }) == 0);  // backwards, with gaps
}

TEST_CASE("access pattern: streams beside each other are not scattered") {
  AccessPattern pattern;
  CHECK(scattered(pattern, 4000, [](int i) { return i % 4 * 1_GiB + in_order(i / 4); }) == 0);
}

TEST_CASE("access pattern: a small file is never scattered, what lies at the end of all numbers does no harm") {
  std::mt19937_64 random(1);
  AccessPattern pattern;
  CHECK(scattered(pattern, 1000, [&](int) { return random() % 1_MiB; }) == 0);
  CHECK(scattered(pattern, 1000, [&](int) { return ~uint64_t{0} - random() % 1_MiB; }) == 0);
}

}  // namespace
}  // namespace imgfuse::test
