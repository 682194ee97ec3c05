// How fast the background may go, in milliseconds of a clock that nobody waits for.
#include "layer/pace.h"

#include <doctest/doctest.h>

#include <deque>

namespace imgfuse::test {
namespace {

/// 1000 KiB/s at least: 1024 bytes per ms.
CopySettings settings() {
  CopySettings settings;
  settings.read_measure_time = settings.write_measure_time = 100;
  settings.average_alpha = 80;
  settings.min_read_throughput = settings.min_write_throughput = 1000;
  settings.throttle_time = 500;
  return settings;
}

/// Gives these numbers, then zeros; each below what is asked for.
struct Numbers {
  std::deque<uint64_t> left;
  uint64_t operator()(uint64_t n) {
    if (left.empty()) return 0;
    const uint64_t next = left.front();
    left.pop_front();
    REQUIRE(next < n);
    return next;
  }
};

constexpr Milliseconds ms(double n) { return Milliseconds(n); }

}  // namespace

TEST_CASE("pace: nothing is decided before the measuring time is over") {
  Pace pace(settings(), 0, Numbers{});

  for (int i = 0; i < 10; ++i) pace.add_read(1, ms(10));  // 100 ms: not more

  CHECK_FALSE(pace.wants_pause());
  pace.add_read(1, ms(1));
  CHECK(pace.wants_pause());
}

TEST_CASE("pace: below the least throughput a coin decides between a pause and a new average") {
  Pace pace(settings(), 0, Numbers{{1, 1, 0}});

  pace.add_read(1000, ms(101));
  CHECK_FALSE(pace.wants_pause());
  pace.add_write(1000, ms(101));
  CHECK_FALSE(pace.wants_pause());
  pace.add_read(1000, ms(101));
  CHECK(pace.wants_pause());
}

TEST_CASE("pace: a pause lasts from 1 ms to the throttle time and 1, and is taken once") {
  for (const uint64_t number : {uint64_t{0}, uint64_t{77}, uint64_t{500}}) {
    Pace pace(settings(), 0, Numbers{{0, number}});
    pace.add_write(1000, ms(200));

    CHECK(pace.wait(ms(0), 4096).count() == doctest::Approx(1.0 + static_cast<double>(number)));
    CHECK(pace.wait(ms(0), 4096).count() == 0);
  }
}

TEST_CASE("pace: nothing is measured while a pause is due, and all begins again behind it") {
  Pace pace(settings(), 0, Numbers{});
  pace.add_read(1000, ms(200));
  pace.add_write(1, ms(1000));
  CHECK(pace.wait(ms(0), 1).count() > 0);

  pace.add_write(1, ms(90));  // would be far past the measuring time with what came before

  CHECK_FALSE(pace.wants_pause());
}

TEST_CASE("pace: old averages count for alpha percent") {
  Average average(100, 80, 1000);
  const auto tails = [] { return false; };

  CHECK_FALSE(average.add(202000, ms(101), tails));  // 2000 bytes per ms
  CHECK(*average.bytes_per_ms() == doctest::Approx(2000));
  CHECK_FALSE(average.add(101000, ms(101), tails));  // 1000
  CHECK(*average.bytes_per_ms() == doctest::Approx(0.8 * 2000 + 0.2 * 1000));
}

TEST_CASE("pace: fast enough is never throttled, and without a throttle time nothing is") {
  Pace fast(settings(), 0, Numbers{});
  for (int i = 0; i < 1000; ++i) fast.add_read(1 << 20, ms(100));
  CHECK_FALSE(fast.wants_pause());

  CopySettings off = settings();
  off.throttle_time = 0;
  Pace slow(off, 0, Numbers{});
  for (int i = 0; i < 1000; ++i) slow.add_read(1, ms(100));
  CHECK_FALSE(slow.wants_pause());
  CHECK(slow.wait(ms(0), 1 << 20).count() == 0);
}

TEST_CASE("pace: a rate spreads the pieces evenly, and idle time is not made up for") {
  Pace pace(settings(), 1000000, Numbers{});  // 1000 bytes per ms

  CHECK(pace.wait(ms(0), 100000).count() == 0);
  CHECK(pace.wait(ms(10), 100000).count() == doctest::Approx(90));
  CHECK(pace.wait(ms(1000), 100000).count() == 0);
  CHECK(pace.wait(ms(1000), 100000).count() == doctest::Approx(100));
}

}  // namespace imgfuse::test
