// Streams and commits at work, through Disk::jobs(): what the disk reads as, and what each image holds at the end.
#include <doctest/doctest.h>

#include "live_chain.h"

namespace imgfuse {
namespace {

using namespace imgfuse::test;

TEST_CASE("stream: the disk needs nothing below it, or below the base, and reads as its guest wrote it") {
  for (const ChainShape& shape : kChainShapes)
    for (size_t base = 0; base < shape.clusters.size(); ++base) {
      if (base == 1) continue;  // 0: none
      CAPTURE(std::string(shape.name));
      CAPTURE(base);
      CAPTURE(base_seed());
      LiveChain live(shape, base_seed() + base);
      const auto base_content = base > 0 ? live.image_content(base) : std::vector<std::byte>();
      const auto start = content(*live);
      const uint64_t id = must(live.jobs().start({.granularity = uint64_t{512} << live.rng().below(10),
                                                  .buffer = 256_KiB,
                                                  .in_flight = 3,
                                                  .rate = 1,
                                                  .kind = JobKind::stream,
                                                  .base = base > 0 ? std::optional(name_of(base)) : std::nullopt}));
      CHECK(live.status().kind == "stream");
      CHECK(content(*live) == start);
      live.work(15);
      const auto worked = content(*live);
      (void)live.jobs().set_rate(id, 0);  // it may have had nothing to do

      const JobStatus status = live.wait(JobState::completed);

      CHECK(status.state == JobState::completed);
      CHECK(!status.error);
      CHECK(content(*live) == worked);
      live.work(3);
      const auto now = content(*live);
      must(live.close());
      CHECK(live.backing_of_top() == (base > 0 ? std::optional(name_of(base)) : std::nullopt));
      CHECK(live.image_content(0) == now);
      if (base > 0) CHECK(live.image_content(base) == base_content);
      live.check_images();
    }
}

TEST_CASE("stream: what all layers have as a hole takes no space") {
  LiveChain live({"on raw", {65536, 0}}, 1);
  must(live->discard({GuestOffset(0), kChainSize}));
  LiveChain empty({"on large", {4096, 1 << 20}}, 1);
  for (LiveChain* chain : {&live, &empty}) {
    must(chain->jobs().start({.kind = JobKind::stream}));
    CHECK(chain->wait(JobState::completed).state == JobState::completed);
  }
  CHECK(live->allocated() == 0);
}

TEST_CASE("commit: the base is what the guest wrote, and the mount goes on with it") {
  for (const ChainShape& shape : kChainShapes)
    for (size_t base = 1; base < shape.clusters.size() && shape.commits(); ++base) {
      CAPTURE(std::string(shape.name));
      CAPTURE(base);
      CAPTURE(base_seed());
      LiveChain live(shape, base_seed() + base);
      const auto start = content(*live);
      const uint64_t id = must(live.jobs().start({.granularity = uint64_t{512} << live.rng().below(10),
                                                  .buffer = 256_KiB,
                                                  .in_flight = 3,
                                                  .rate = 1,
                                                  .kind = JobKind::commit,
                                                  .base = name_of(base)}));
      CHECK(content(*live) == start);
      live.work(15);
      const auto worked = content(*live);
      (void)live.jobs().set_rate(id, 0);  // it may have had nothing to do

      const JobStatus status = live.wait(JobState::completed);

      CHECK(status.state == JobState::completed);
      CHECK(!status.error);
      CHECK(content(*live) == worked);
      live.work(3);
      const auto now = content(*live);
      must(live->flush());
      CHECK(live.image_content(0) == now);  // the image above the base hides nothing of it
      must(live.close());
      CHECK(live.image_content(base) == now);
      CHECK(live.image_content(0) == now);
      CHECK(live.backing_of_top() == name_of(base));
      live.check_images();
    }
}

TEST_CASE("stream, commit: beside a guest with threads nothing fails, at the end either") {
  for (const JobKind kind : {JobKind::stream, JobKind::commit})
    for (const ChainShape& shape : kChainShapes) {
      if (!shape.commits() && kind == JobKind::commit) continue;
      CAPTURE(static_cast<int>(kind));
      CAPTURE(std::string(shape.name));
      LiveChain live(shape, base_seed());
      {
        Guest guest(*live);
        const auto id = live.jobs().start({.granularity = 4096, .buffer = kChainSize, .kind = kind});
        if (!id && !live.backing_of_top()) continue;  // an FVD image that is full, and has left its base
        must(id);
        CHECK(live.wait(JobState::completed).state == JobState::completed);
        const uint64_t then = guest.requests();
        while (guest.requests() < then + 20 && guest.wrong() == 0) std::this_thread::yield();
        guest.stop();
        CHECK(guest.wrong() == 0);
      }
      const auto now = content(*live);
      must(live.close());
      CHECK(live.image_content(0) == now);
      live.check_images();
    }
}

TEST_CASE("commit: an image that becomes full and leaves its base is not committed, and stays what it is") {
  LiveChain live({"FVD on raw", {65536, 0}, "fvd"}, 1);
  const auto base = live.image_content(1);
  const auto now = pattern(kChainSize, 2);
  live.chain().when_found = [&] { must(live->write(GuestOffset(0), now)); };

  const auto started = live.jobs().start({.kind = JobKind::commit});

  REQUIRE(!started);
  CHECK(started.error().text() == "memory has no backing file");
  CHECK(content(*live) == now);
  live.work(5);
  const auto later = content(*live);
  must(live.close());
  CHECK(live.image_content(0) == later);
  CHECK(live.image_content(1) == base);
  live.check_images();
}

TEST_CASE("stream, commit: cancelled, the chain is as it was, and reads as the guest wrote it") {
  unsigned cancelled = 0;
  for (const JobKind kind : {JobKind::stream, JobKind::commit})
    for (const ChainShape& shape : kChainShapes) {
      if (!shape.commits() && kind == JobKind::commit) continue;
      CAPTURE(static_cast<int>(kind));
      CAPTURE(std::string(shape.name));
      LiveChain live(shape, base_seed());
      const uint64_t id =
          must(live.jobs().start({.granularity = 4096, .buffer = 64_KiB, .in_flight = 1, .rate = 1, .kind = kind}));
      live.work(5);
      (void)live.jobs().cancel(id);  // it may have had nothing to do
      const JobState end = live.wait(JobState::cancelled).state;
      CHECK((end == JobState::cancelled || end == JobState::completed));
      live.work(5);
      const auto now = content(*live);

      if (end == JobState::cancelled) {
        ++cancelled;
        must(live.jobs().start({.kind = kind}));  // goes on where the other one was
        CHECK(live.wait(JobState::completed).state == JobState::completed);
      }

      CHECK(content(*live) == now);
      must(live.close());
      CHECK(live.image_content(0) == now);
      live.check_images();
    }
  CHECK(cancelled > kChainShapes.size());
}

TEST_CASE("stream, commit: an error at any call of either image costs the guest nothing") {
  const ChainShape shape{"large on small", {65536, 4096}};
  for (const JobKind kind : {JobKind::stream, JobKind::commit})
    for (const size_t layer : {0u, 1u}) {
      bool fired = true;
      for (uint64_t n = 1; fired; n += 3 * fault_step()) {
        CAPTURE(static_cast<int>(kind));
        CAPTURE(layer);
        CAPTURE(n);
        LiveChain live(shape, 7);
        const auto before = content(*live);
        live.faults(layer).fail_call(n, ErrorCode::no_space, {Call::write | Call::zero});
        const auto id = live.jobs().start({.granularity = 16384, .kind = kind});
        if (id) {
          const JobStatus status = live.wait(JobState::completed);
          CHECK((status.state == JobState::completed || status.state == JobState::failed));
          if (status.state == JobState::failed) CHECK(status.error.has_value());
        }
        fired = live.faults(layer).fired();
        live.faults(layer).heal();
        CHECK(content(*live) == before);
        (void)live.close();  // an image that has latched an error says so
        CHECK(live.image_content(0) == before);
      }
    }
}

TEST_CASE("stream, commit: an image that has been moved away is not closed") {
  for (const JobKind kind : {JobKind::stream, JobKind::commit})
    for (const bool cancelled : {false, true}) {
      CAPTURE(static_cast<int>(kind));
      CAPTURE(cancelled);
      LiveChain live({"on raw", {65536, 0}}, 1);
      const uint64_t id = must(live.jobs().start({.buffer = 64_KiB, .in_flight = 1, .rate = 1, .kind = kind}));
      live.chain().moved = true;
      live.work(5);
      const auto before = content(*live);
      must(cancelled ? live.jobs().cancel(id) : live.jobs().set_rate(id, 0));

      const JobStatus status = live.wait(JobState::cancelled);

      CHECK(status.state == (cancelled ? JobState::cancelled : JobState::failed));
      CHECK(content(*live) == before);
      CHECK(!live.jobs().start({.kind = kind}));
      live.chain().moved = false;
      if (kind == JobKind::commit) CHECK(live.jobs().start({.kind = kind}).error().code() == ErrorCode::busy);
      live.work(5);
      const auto now = content(*live);
      must(live.close());
      CHECK(live.image_content(0) == now);
      live.check_images();
    }
}

TEST_CASE("stream, commit: what they refuse") {
  LiveChain live({"three", {65536, 4096, 65536}}, 1);
  CHECK(live.jobs().start({.kind = JobKind::stream, .base = name_of(1)}).error().text() ==
        "layer1 is the backing file of memory: nothing lies between them");
  for (const JobKind kind : {JobKind::stream, JobKind::commit}) {
    CHECK(live.jobs().start({.kind = kind, .base = "nowhere"}).error().code() == ErrorCode::not_found);
    JobDisk plain = qcow2_disk({.size = kChainSize});
    auto alone = with_jobs(std::unique_ptr<Disk>(plain.disk.release()), {});
    CHECK(alone->jobs()->start({.kind = kind}).error().code() == ErrorCode::unsupported);
    must(alone->close());
  }
  const uint64_t id = must(live.jobs().start({.rate = 1, .kind = JobKind::commit}));
  CHECK(live.jobs().complete(id).error().text() == "job 1 is a commit, which ends by itself");
  CHECK(live->resize(2 * kChainSize).error().text() == "resize: a commit runs on this disk");
  must(live.jobs().cancel(id));
  CHECK(live.wait(JobState::cancelled).state == JobState::cancelled);
  must(live->resize(2 * kChainSize));
}

}  // namespace
}  // namespace imgfuse
