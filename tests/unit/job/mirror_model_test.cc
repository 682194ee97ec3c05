// The mirror's engine and its copying with real disks, stepped by hand: a guest changes the source at every point.
#include <doctest/doctest.h>

#include <optional>

#include "job/mirror_copy.h"
#include "job/mirror_engine.h"
#include "mirrors.h"
#include "support/tracking.h"

namespace imgfuse::job {
namespace {

using namespace imgfuse::test;

constexpr uint64_t kSize = 4_MiB + 3 * 512;

/// A mirror that does one thing at a time.
struct SteppedMirror {
  SteppedMirror(Disk& from, Disk& to, uint64_t granularity, bool widen = true)
      : source(from),
        target(to),
        guest(from, [this](GuestRange range) { engine.mark(range); }),
        engine(shape(from, to, granularity, widen)) {}

  static MirrorShape shape(Disk& from, Disk& to, uint64_t granularity, bool widen) {
    const uint64_t cluster = to.info().cluster_size;
    const uint64_t whole = widen && cluster > granularity ? cluster : 0;
    return {from.size(), granularity, std::max({granularity, whole, 1_MiB}), 4, whole};
  }

  Result<> survey(MirrorSync sync = MirrorSync::full, bool target_is_zero = true) {
    Survey all(source, target, {sync, target_is_zero}, [this](GuestRange range) { engine.mark(range); });
    for (;;) {
      IMG_LET(const bool more, all.step());
      if (!more) return {};
    }
  }
  bool begin() {
    auto* const operation = engine.start({});
    if (operation != nullptr) started.push_back(operation);
    return operation != nullptr;
  }
  Result<> copy(size_t which) {
    auto* const operation = started.at(which);
    started.erase(started.begin() + static_cast<long>(which));
    const Result<> copied = copy_range(source, target, operation->range(), operation->memory());
    engine.finished(*operation, copied.has_value());
    return copied;
  }
  Result<> drain() {
    while (begin() || !started.empty()) IMG_TRY(copy(0));
    return {};
  }

  Disk& source;
  Disk& target;
  Tracking guest;
  MirrorEngine engine;
  std::vector<MirrorEngine::Operation*> started;
};

TEST_CASE("mirror model: random guest requests beside the mirror, for every pair and granularity") {
  const uint64_t runs = from_environment("IMG_RUNS", 1);
  for (const Kind& from : kinds()) {
    for (const Kind& to : kinds()) {
      for (const uint64_t granularity : {512u, 4096u, 65536u, 2u << 20}) {
        for (uint64_t run = 0; run < runs; ++run) {
          const uint64_t seed = base_seed() + run;
          CAPTURE(from.name);
          CAPTURE(to.name);
          CAPTURE(granularity);
          CAPTURE(seed);
          Rng rng(seed);
          JobDisk source = from.make(kSize);
          JobDisk target = to.make(kSize);
          scribble(*source, rng, 20);
          SteppedMirror mirror(*source, *target, granularity);
          must(mirror.survey());

          for (int step = 0; step < 120; ++step) {
            switch (rng.below(4)) {
              case 0:
                must(guest_request(mirror.guest, rng));
                break;
              case 1:
                mirror.begin();
                break;
              default:
                if (!mirror.started.empty()) must(mirror.copy(rng.below(mirror.started.size())));
            }
          }
          must(mirror.drain());

          CHECK(mirror.engine.remaining() == 0);
          REQUIRE(content(*target) == content(*source));
        }
      }
    }
  }
}

TEST_CASE("mirror model: a guest that changes what is being copied, at every point of an operation") {
  constexpr uint64_t kDisk = 1_MiB;
  for (const Kind& to : kinds()) {
    for (int point = 0;; ++point) {
      CAPTURE(to.name);
      CAPTURE(point);
      JobDisk below = qcow2_disk({.size = kDisk, .cluster_size = 65536});
      must(below->write(GuestOffset(0), pattern(200_KiB, 1)));
      must(below->write(GuestOffset(400_KiB), pattern(100_KiB, 2)));
      JobDisk target = to.make(kDisk);
      HookedDisk source(*below);
      HookedDisk hooked_target(*target);
      SteppedMirror mirror(source, hooked_target, 4096);
      must(mirror.survey());
      Tracking guest(*below, [&](GuestRange range) { mirror.engine.mark(range); });
      int calls = 0;
      bool fired = false;
      source.at = hooked_target.at = [&] {
        if (calls++ != point) return;
        fired = true;
        must(guest.write(GuestOffset(100_KiB + 512), pattern(8_KiB, 3)));
        must(guest.write_zeroes({GuestOffset(410_KiB), 20_KiB}, Zeroing::may_free));
        must(guest.write(GuestOffset(300_KiB), pattern(64_KiB, 4)));
        must(guest.discard({GuestOffset(0), 64_KiB}));
      };

      must(mirror.drain());

      REQUIRE(content(*target) == content(*below));
      if (!fired) break;
    }
  }
}

TEST_CASE("mirror model: the copy of an overlay's own layer, onto the same backing file") {
  Rng rng(base_seed());
  CAPTURE(base_seed());
  for (const uint64_t granularity : {4096u, 65536u, 1u << 20}) {
    for (const uint32_t cluster : {4096u, 65536u, 1u << 20}) {
      const MemImage backing = scribbled_image(kSize - 1_MiB, rng);
      const Qcow2Spec spec{.size = kSize, .cluster_size = 65536, .backing = "base"};
      JobDisk source = qcow2_disk(spec, backing);
      JobDisk target = qcow2_disk({.size = kSize, .cluster_size = cluster, .backing = "base"}, backing);
      scribble(*source, rng, 5);
      SteppedMirror mirror(*source, *target, granularity, /*widen=*/false);
      must(mirror.survey(MirrorSync::top, false));
      CHECK(mirror.engine.remaining() < kSize);
      for (int i = 0; i < 10; ++i) {
        must(guest_request(mirror.guest, rng));
        if (mirror.begin()) must(mirror.copy(0));
      }
      must(mirror.drain());

      REQUIRE(content(*target) == content(*source));
    }
  }
}

TEST_CASE("mirror model: a target that holds something else becomes the same") {
  Rng rng(base_seed());
  CAPTURE(base_seed());
  for (const Kind& to : kinds()) {
    JobDisk source = qcow2_disk({.size = kSize, .cluster_size = 65536});
    JobDisk target = to.make(kSize);
    scribble(*source, rng, 10);
    scribble(*target, rng, 40);
    SteppedMirror mirror(*source, *target, 65536);
    must(mirror.survey(MirrorSync::full, false));
    must(mirror.drain());
    REQUIRE(content(*target) == content(*source));
  }
}

TEST_CASE("mirror model: a target without a backing file gets the whole of each cluster that changes") {
  JobDisk source = raw_disk(kSize);
  must(source->write(GuestOffset(0), pattern(kSize, 1)));
  JobDisk target = qcow2_disk({.size = kSize, .cluster_size = 65536});
  SteppedMirror mirror(*source, *target, 4096);
  must(mirror.survey(MirrorSync::none));
  CHECK(mirror.engine.remaining() == 0);

  must(mirror.guest.write(GuestOffset(70000), pattern(100, 2)));
  must(mirror.drain());

  CHECK(read_all(*target, GuestOffset(65536), 65536) == read_all(*source, GuestOffset(65536), 65536));
  CHECK(target->map({GuestOffset(0), 65536})->front().kind == ExtentKind::hole);
}

TEST_CASE("mirror model: holes and zeros are not read, and take no space") {
  JobDisk source = qcow2_disk({.size = 64_MiB});
  JobDisk target = raw_disk(64_MiB);
  must(source->write(GuestOffset(1_MiB), pattern(64_KiB)));
  must(source->write_zeroes({GuestOffset(2_MiB), 1_MiB}, Zeroing::keep_allocation));
  SteppedMirror mirror(*source, *target, 65536);
  must(mirror.survey());
  CHECK(mirror.engine.remaining() == 64_KiB);
  must(mirror.guest.write_zeroes({GuestOffset(8_MiB), 1_MiB}, Zeroing::may_free));
  source.memory->counts().reset();
  target.memory->counts().reset();
  must(mirror.drain());

  CHECK(source.memory->counts().bytes_read < 64_KiB + 65536);  // the data, and a table
  CHECK(target.memory->counts().bytes_written == 64_KiB);
  CHECK(target.memory->image().allocated() == 64_KiB);
  CHECK(content(*target) == content(*source));
}

TEST_CASE("mirror model: after an error at any call of either side, going on makes them alike") {
  for (const bool on_source : {true, false}) {
    for (int n = 1;; ++n) {
      CAPTURE(on_source);
      CAPTURE(n);
      Rng rng(7);
      JobDisk source = qcow2_disk({.size = kSize, .cluster_size = 4096});
      JobDisk target = qcow2_disk({.size = kSize, .cluster_size = 65536});
      scribble(*source, rng, 8);
      SteppedMirror mirror(*source, *target, 16384);
      FaultStorage& faults = on_source ? *source.faults : *target.faults;
      // Whether the target's file can be made longer ahead of need is nobody's trouble.
      const auto calls = Call::read | Call::write | Call::zero | Call::discard;
      faults.fail_call(static_cast<uint64_t>(n), ErrorCode::no_space, {on_source ? calls | Call::query : calls});

      int errors = 0;
      while (!mirror.survey()) ++errors;
      for (int round = 0; round < 100; ++round)
        if (!mirror.drain()) ++errors;

      const bool fired = faults.fired();
      faults.heal();

      CHECK(mirror.engine.remaining() == 0);
      CHECK(errors == (fired ? 1 : 0));
      REQUIRE(content(*target) == content(*source));
      if (!fired) break;
    }
  }
}

}  // namespace
}  // namespace imgfuse::job
