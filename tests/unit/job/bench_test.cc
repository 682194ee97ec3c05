#include <doctest/doctest.h>

#include <set>
#include <thread>

#include "support/gate_storage.h"
#include "unit/job/disks.h"

namespace imgfuse::test {
TEST_CASE("bench: requests go through the disk in steps, and from the offset again") {
  struct Case {
    BenchOptions options;
    std::set<uint64_t> places;
  };
  const std::vector<Case> cases = {
      {{.count = 3}, {0, 4096, 8192}},
      {{.count = 100}, {0, 4096, 8192, 12288}},
      {{.count = 2, .offset = 4096}, {4096, 8192}},
      {{.count = 100, .offset = 4096}, {4096, 8192, 12288}},
      {{.count = 100, .step = 8192}, {0, 8192}},
      {{.count = 2, .step = 1_TiB + 4096}, {0, 4096}},
      {{.count = 100, .length = 16384}, {0}},
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    for (const unsigned depth : {1u, 3u}) {
      CAPTURE(i);
      CAPTURE(depth);
      JobDisk disk = raw_disk(16384);
      BenchOptions options = cases[i].options;
      options.depth = depth;
      options.write = true;
      options.pattern = 7;

      must(bench(*disk, options));

      std::vector<std::byte> expected(16384);
      for (const uint64_t place : cases[i].places)
        std::fill_n(expected.begin() + static_cast<ptrdiff_t>(place), options.length, std::byte{7});
      CHECK(content(*disk) == expected);
      CHECK(disk.memory->counts().writes == options.count);
    }
  }
}

TEST_CASE("bench: reads change nothing") {
  JobDisk disk = raw_disk(1_MiB);
  disk.memory->counts().reset();

  must(bench(*disk, {.count = 1000, .depth = 4, .pattern = 7}));

  CHECK(disk.memory->counts().reads == 1000);
  CHECK(disk.memory->counts().writes == 0);
}

TEST_CASE("bench: flushes come after so many writes, at the end of the last ones too") {
  for (const bool drain : {true, false}) {
    for (const unsigned depth : {1u, 5u}) {
      CAPTURE(drain);
      CAPTURE(depth);
      JobDisk disk = raw_disk(1_MiB);
      disk.memory->counts().reset();

      must(bench(*disk, {.count = 40, .depth = depth, .write = true, .flush_interval = 8, .drain = drain}));

      CHECK(disk.memory->counts().writes == 40);
      CHECK(disk.memory->counts().flushes <= 5);
      CHECK(disk.memory->counts().flushes >= (drain || depth == 1 ? 5 : 1));
    }
  }
}

TEST_CASE("bench: as many requests are under way as the depth says, and none during a flush with drain") {
  auto memory = std::make_shared<MemStorage>(make_qcow2({.size = 1_MiB}));
  auto gates = std::make_shared<GateStorage>(memory);
  auto disk = must(open_qcow2(gates));
  must(disk->write(GuestOffset(0), pattern(1_MiB)));
  must(disk->flush());
  const auto on_write = gates->hold(Call::write, Point::before, [](HostRange range) { return range.length == 512; });
  const auto on_flush = gates->hold(Call::flush);
  memory->counts().reset();

  auto run = in_background(
      [&] { return bench(*disk, {.count = 12, .depth = 3, .length = 512, .write = true, .flush_interval = 6}); });
  on_write->wait_for_arrival();
  while (memory->counts().writes < 5) std::this_thread::yield();  // the two others do the rest of the round
  CHECK_FALSE(on_flush->has_arrived());
  on_write->open();
  on_flush->wait_for_arrival();
  CHECK(waits(run));
  CHECK(memory->counts().writes == 6);

  on_flush->open();
  must(run.get());
  CHECK(memory->counts().writes == 12);
  CHECK(memory->counts().flushes == 2);
  must(disk->close());
}

TEST_CASE("bench: the first failure ends it") {
  JobDisk disk = raw_disk(1_MiB);
  disk.faults->fail_call(10, ErrorCode::io);

  const auto result = bench(*disk, {.count = 10'000'000, .depth = 4});

  REQUIRE_FALSE(result);
  CHECK(result.error().code() == ErrorCode::io);
  CHECK(disk.memory->counts().reads < 1'000'000);
}

TEST_CASE("bench: numbers that make no sense are refused") {
  JobDisk disk = raw_disk(1_MiB);
  const std::vector<BenchOptions> bad = {
      {.count = 0},
      {.count = kMaxBenchCount + 1},
      {.depth = 0},
      {.depth = kMaxBenchDepth + 1},
      {.length = 0},
      {.depth = 1, .length = 1_MiB + 1},
      {.depth = 1024, .length = 2_MiB},
      {.length = ~uint64_t{0}},
      {.offset = 1_MiB - 4095},
      {.offset = ~uint64_t{0}},
      {.flush_interval = 1},
  };
  disk.memory->counts().reset();

  for (size_t i = 0; i < bad.size(); ++i) {
    CAPTURE(i);
    const auto result = bench(*disk, bad[i]);
    REQUIRE_FALSE(result);
    CHECK(result.error().code() == ErrorCode::invalid);
  }
  CHECK(disk.memory->counts().reads == 0);
}

}  // namespace imgfuse::test
