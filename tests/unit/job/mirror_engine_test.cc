// The engine of the mirror, step by step: no threads, no I/O, a clock made of numbers.
#include "job/mirror_engine.h"

#include <doctest/doctest.h>

#include "support/random.h"

namespace imgfuse::job {
namespace {

constexpr uint64_t kGranule = 64_KiB;

/// An engine with the granules as its unit.
struct Steps {
  explicit Steps(const MirrorShape& shape) : granule(shape.granularity), engine(shape) {}

  void mark(uint64_t first, uint64_t count = 1) { engine.mark({GuestOffset(first * granule), count * granule}); }
  MirrorEngine::Operation* start() { return engine.start(now); }
  /// What starts, as granules.
  std::pair<uint64_t, uint64_t> next() {
    auto* const operation = start();
    if (operation == nullptr) return {0, 0};
    started.push_back(operation);
    return granules(*operation);
  }
  std::pair<uint64_t, uint64_t> granules(const MirrorEngine::Operation& operation) const {
    return {operation.range().begin.bytes() / granule, (operation.range().length + granule - 1) / granule};
  }
  void finish(size_t which = 0, bool copied = true) {
    engine.finished(*started.at(which), copied);
    started.erase(started.begin() + static_cast<long>(which));
  }

  const uint64_t granule;
  Time now;
  MirrorEngine engine;
  std::vector<MirrorEngine::Operation*> started;
};

using Pair = std::pair<uint64_t, uint64_t>;
constexpr Pair kNothing{0, 0};

MirrorShape shape(uint64_t granules, uint64_t buffer, unsigned in_flight, uint64_t whole_clusters = 0) {
  return {granules * kGranule, kGranule, buffer * kGranule, in_flight, whole_clusters * kGranule};
}

TEST_CASE("mirror engine: nothing dirty, nothing to do") {
  Steps steps(shape(16, 16, 4));
  CHECK(steps.next() == kNothing);
  CHECK(steps.engine.remaining() == 0);
}

TEST_CASE("mirror engine: a change makes the granules dirty that it touches, and the disk may end in one") {
  MirrorEngine engine({.size = 3 * kGranule + 100, .granularity = kGranule, .buffer = 4 * kGranule, .in_flight = 1});
  engine.mark({GuestOffset(3 * kGranule - 1), 2});

  auto* const operation = engine.start({});

  REQUIRE(operation != nullptr);
  CHECK(operation->range() == GuestRange{GuestOffset(2 * kGranule), kGranule + 100});
  engine.finished(*operation, true);
  CHECK(engine.remaining() == 0);
  CHECK(engine.copied() == kGranule + 100);
}

TEST_CASE("mirror engine: what remains is bytes of the disk, and not what others write to both sides") {
  MirrorEngine engine({.size = 3 * kGranule + 100, .granularity = kGranule, .buffer = 4 * kGranule, .in_flight = 1});
  engine.mark({GuestOffset(0), 3 * kGranule + 100});
  CHECK(engine.remaining() == 3 * kGranule + 100);

  auto* const operation = engine.start({});
  REQUIRE(operation != nullptr);
  CHECK(engine.remaining() == 3 * kGranule + 100);
  engine.finished(*operation, true);
  CHECK(engine.remaining() == 0);
  CHECK(engine.copied() == 3 * kGranule + 100);

  REQUIRE(engine.enter({GuestOffset(0), 3 * kGranule}) == MirrorEngine::Entry::both);
  CHECK(engine.remaining() == 0);
  engine.leave({GuestOffset(0), 3 * kGranule}, false);
  CHECK(engine.remaining() == 3 * kGranule);
}

TEST_CASE("mirror engine: neighbours join, up to an operation's part of the buffer and its borders") {
  Steps steps(shape(64, 32, 4));  // 8 granules each
  steps.mark(3, 20);
  steps.mark(40);
  CHECK(steps.next() == Pair(3, 5));
  CHECK(steps.next() == Pair(8, 8));
  CHECK(steps.next() == Pair(16, 7));
  CHECK(steps.next() == Pair(40, 1));
  CHECK(steps.next() == kNothing);
}

TEST_CASE("mirror engine: no more operations than may be in flight") {
  Steps steps(shape(64, 64, 2));
  for (uint64_t i : {0, 10, 20}) steps.mark(i);
  CHECK(steps.next() == Pair(0, 1));
  CHECK(steps.next() == Pair(10, 1));
  CHECK(steps.next() == kNothing);
  steps.finish(1);
  CHECK(steps.next() == Pair(20, 1));
}

TEST_CASE("mirror engine: an operation that finds too little memory waits, and gets what it needs") {
  Steps steps(shape(64, 3, 3, 2));  // 3 pieces, clusters of 2 granules
  steps.mark(0, 2);
  steps.mark(10, 2);
  CHECK(steps.next() == Pair(0, 2));
  CHECK(steps.next() == kNothing);  // one piece is left
  steps.finish();
  CHECK(steps.next() == Pair(10, 2));
  steps.finish();
  CHECK(steps.engine.remaining() == 0);
}

TEST_CASE("mirror engine: memory of operations in flight is never shared, and joined where it can be") {
  test::Rng rng(test::base_seed());
  CAPTURE(test::base_seed());
  Steps steps(shape(1024, 40, 8));
  for (int round = 0; round < 2000; ++round) {
    steps.mark(rng.below(1000), rng.between(1, 12));
    if (steps.next() == kNothing || rng.one_in(2))
      if (!steps.started.empty()) steps.finish(rng.below(steps.started.size()), !rng.one_in(4));
    std::vector<std::pair<std::byte*, std::byte*>> used;
    for (const auto* operation : steps.started) {
      uint64_t length = 0;
      for (const Bytes part : operation->memory()) {
        length += part.size();
        for (const auto& [begin, end] : used) REQUIRE((part.data() + part.size() <= begin || part.data() >= end));
        used.emplace_back(part.data(), part.data() + part.size());
      }
      REQUIRE(length >= operation->range().length);
    }
  }
  while (!steps.started.empty()) steps.finish();
  steps.mark(0, 1024);
  REQUIRE(steps.next() != kNothing);
  CHECK(steps.started.front()->memory().size() == 1);  // all of it is free and in order again
}

TEST_CASE("mirror engine: a granule that is dirty again waits for the operation on it; others go on") {
  Steps steps(shape(64, 64, 8));
  steps.mark(4, 2);
  CHECK(steps.next() == Pair(4, 2));
  steps.mark(5);
  steps.mark(7);
  steps.mark(20);

  CHECK(steps.next() == Pair(7, 1));
  CHECK(steps.next() == Pair(20, 1));
  CHECK(steps.next() == kNothing);
  CHECK(steps.engine.remaining() == (1 + 2 + 1 + 1) * kGranule);
  steps.finish();
  CHECK(steps.next() == Pair(5, 1));
}

TEST_CASE("mirror engine: a run ends where an operation is on its way") {
  Steps steps(shape(64, 64, 4));
  steps.mark(5);
  CHECK(steps.next() == Pair(5, 1));
  steps.mark(3, 5);
  CHECK(steps.next() == Pair(6, 2));
  CHECK(steps.next() == Pair(3, 2));
  CHECK(steps.next() == kNothing);
  steps.finish();
  CHECK(steps.next() == Pair(5, 1));
}

TEST_CASE("mirror engine: the first operation on a cluster takes all of it, later ones do not") {
  Steps steps(shape(30, 64, 4, 4));
  steps.mark(5);
  CHECK(steps.next() == Pair(4, 4));
  steps.finish();
  steps.mark(6);
  CHECK(steps.next() == Pair(6, 1));
  steps.finish();
  steps.mark(7, 2);  // one in the cluster that is there, one in the next
  CHECK(steps.next() == Pair(7, 5));
  steps.finish();
  steps.mark(29);  // the last cluster is cut by the disk's end
  CHECK(steps.next() == Pair(28, 2));
  steps.finish();
  steps.mark(28);
  CHECK(steps.next() == Pair(28, 1));
}

TEST_CASE("mirror engine: clusters take turns too") {
  Steps steps(shape(64, 64, 4, 4));
  steps.mark(4);
  CHECK(steps.next() == Pair(4, 4));
  steps.mark(7);
  steps.mark(9);
  CHECK(steps.next() == Pair(8, 4));
  CHECK(steps.next() == kNothing);
  steps.finish();
  CHECK(steps.next() == Pair(7, 1));
}

TEST_CASE("mirror engine: a cluster that was not written is taken as a whole the next time as well") {
  Steps steps(shape(64, 64, 4, 4));
  steps.mark(5);
  CHECK(steps.next() == Pair(4, 4));
  steps.finish(0, false);
  CHECK(steps.engine.remaining() == 4 * kGranule);
  CHECK(steps.next() == Pair(4, 4));
  steps.finish();
  CHECK(steps.engine.remaining() == 0);
}

TEST_CASE("mirror engine: granules larger than the target's clusters are not widened") {
  Steps steps({64 * kGranule, kGranule, 8 * kGranule, 2, 4096});
  steps.mark(5);
  CHECK(steps.next() == Pair(5, 1));
}

TEST_CASE("mirror engine: what fails is dirty again, and so is what changed meanwhile") {
  Steps steps(shape(64, 64, 4));
  steps.mark(1, 2);
  CHECK(steps.next() == Pair(1, 2));
  steps.mark(1);
  steps.finish(0, false);
  CHECK(steps.engine.copied() == 0);
  CHECK(steps.next() == Pair(1, 2));
  steps.finish();
  CHECK(steps.next() == kNothing);
}

TEST_CASE("mirror engine: nothing starts while it is paused; what is on its way ends, nothing is lost") {
  Steps steps(shape(64, 64, 4));
  steps.mark(1);
  steps.mark(9);
  CHECK(steps.next() == Pair(1, 1));
  steps.engine.pause();
  CHECK(steps.next() == kNothing);
  steps.finish();
  steps.mark(20);
  CHECK(steps.next() == kNothing);
  steps.engine.resume();
  CHECK(steps.next() == Pair(9, 1));
  CHECK(steps.next() == Pair(20, 1));
}

TEST_CASE("mirror engine: the rate is kept, over any time") {
  using std::chrono::milliseconds;
  Steps steps(shape(4096, 64, 8));
  steps.mark(0, 4096);
  const uint64_t rate = 10_MiB;
  steps.engine.set_rate(rate);
  uint64_t started = 0;
  for (int ms = 0; ms <= 10000; ++ms) {
    steps.now = Time(milliseconds(ms));
    while (auto* const operation = steps.start()) {
      started += operation->range().length;
      steps.engine.finished(*operation, true);
      CHECK(steps.engine.wake_at() > steps.now);
    }
    if (ms == 0) CHECK(started > 0);
    if (ms >= 2000) {
      REQUIRE(started * 10 >= rate * static_cast<uint64_t>(ms) / 1000 * 9);
      REQUIRE(started * 10 <= rate * static_cast<uint64_t>(ms) / 1000 * 11);
    }
  }
  CHECK(started * 10 <= rate * 10 * 11);
  steps.engine.set_rate(0);
  CHECK(steps.start() != nullptr);
}

TEST_CASE("mirror engine: time without work is not saved up for a burst") {
  Steps steps(shape(4096, 64, 8));
  steps.engine.set_rate(1_MiB);
  steps.now = Time(std::chrono::hours(1));
  steps.mark(0, 4096);
  CHECK(steps.start() != nullptr);
  CHECK(steps.start() == nullptr);
}

TEST_CASE("mirror engine: it holds until it is told") {
  Steps steps(shape(64, 64, 4));
  steps.mark(1);
  steps.engine.hold_until(Time(std::chrono::seconds(5)));
  CHECK(steps.next() == kNothing);
  CHECK(steps.engine.wake_at() == Time(std::chrono::seconds(5)));
  steps.now = Time(std::chrono::seconds(5));
  CHECK(steps.next() == Pair(1, 1));
}

TEST_CASE("mirror engine: a request that writes both sides waits for operations, and they for it") {
  Steps steps(shape(64, 64, 4));
  using Entry = MirrorEngine::Entry;
  const GuestRange range{GuestOffset(5 * kGranule + 100), 200};
  steps.mark(5);
  CHECK(steps.next() == Pair(5, 1));
  CHECK(steps.engine.enter(range) == Entry::wait);
  steps.finish();

  CHECK(steps.engine.enter(range) == Entry::both);
  steps.mark(5);
  CHECK(steps.engine.enter(range) == Entry::wait);  // another request too
  CHECK(steps.next() == kNothing);
  steps.engine.leave(range, true);

  CHECK(steps.next() == Pair(5, 1));  // as it was marked meanwhile
  steps.finish();
  REQUIRE(steps.engine.enter(range) == Entry::both);
  steps.engine.leave(range, true);
  CHECK(steps.engine.remaining() == 0);
  REQUIRE(steps.engine.enter(range) == Entry::both);
  steps.engine.leave(range, false);
  CHECK(steps.next() == Pair(5, 1));
}

TEST_CASE("mirror engine: a request does not write to a cluster that is not there yet, nor while it is paused") {
  Steps steps(shape(64, 64, 4, 4));
  using Entry = MirrorEngine::Entry;
  const GuestRange range{GuestOffset(3 * kGranule), 2 * kGranule};  // in two clusters
  CHECK(steps.engine.enter(range) == Entry::mark);
  steps.mark(0, 1);
  CHECK(steps.next() == Pair(0, 4));
  steps.finish();
  CHECK(steps.engine.enter(range) == Entry::mark);
  steps.mark(4, 4);
  CHECK(steps.next() == Pair(4, 4));
  steps.finish();
  steps.engine.pause();
  CHECK(steps.engine.enter(range) == Entry::mark);
  steps.engine.resume();
  CHECK(steps.engine.enter(range) == Entry::both);
  steps.engine.leave(range, true);
}

TEST_CASE("mirror engine: who is about to change something claims what is dirty of it") {
  Steps steps(shape(64, 8, 2));
  const GuestRange range{GuestOffset(5 * kGranule + 100), 2 * kGranule};  // granules 5 to 7
  steps.mark(6, 10);
  steps.engine.pause();
  steps.engine.set_rate(1);

  const auto claim = steps.engine.claim(range, steps.now);

  REQUIRE(claim.operation != nullptr);
  CHECK(steps.granules(*claim.operation) == Pair(6, 2));
  CHECK(steps.engine.claim(range, steps.now).wait);  // for that one
  steps.engine.finished(*claim.operation, true);
  CHECK(steps.engine.claim(range, steps.now).operation == nullptr);
  CHECK(!steps.engine.claim(range, steps.now).wait);
  CHECK(steps.engine.remaining() == 8 * kGranule);
}

TEST_CASE("mirror engine: a claim takes whole clusters, and waits for memory and for operations") {
  Steps steps(shape(64, 4, 2, 4));
  steps.mark(0, 64);
  CHECK(steps.next() == Pair(0, 4));  // has all memory
  const GuestRange range{GuestOffset(9 * kGranule), 1};
  CHECK(steps.engine.claim(range, steps.now).wait);
  steps.finish();
  const auto claim = steps.engine.claim(range, steps.now);
  REQUIRE(claim.operation != nullptr);
  CHECK(steps.granules(*claim.operation) == Pair(8, 4));
  steps.engine.finished(*claim.operation, false);
  CHECK(steps.engine.claim(range, steps.now).operation != nullptr);  // it is not copied yet
}

TEST_CASE("mirror engine: whole granules are unmarked, those on their way are left alone") {
  MirrorEngine engine({.size = 10 * kGranule + 5, .granularity = kGranule, .buffer = 2 * kGranule, .in_flight = 2});
  engine.mark({GuestOffset(0), 10 * kGranule + 5});
  auto* const operation = engine.start({});
  REQUIRE(operation != nullptr);
  engine.unmark({GuestOffset(0), 3 * kGranule + 1});
  CHECK(engine.remaining() == 8 * kGranule + 5);  // granule 0 is in flight; 3 to 10
  engine.finished(*operation, false);
  CHECK(engine.remaining() == 8 * kGranule + 5);
  engine.unmark({GuestOffset(9 * kGranule), kGranule + 5});
  CHECK(engine.remaining() == 7 * kGranule);
}

}  // namespace
}  // namespace imgfuse::job
