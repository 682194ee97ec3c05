// Backups at work, through Disk::jobs(): of the instant at which they began, whole or by a bitmap.
#include <doctest/doctest.h>

#include "imgfuse/bitmaps.h"
#include "live.h"

namespace imgfuse {
namespace {

using namespace imgfuse::test;

TEST_CASE("backup: the disk of the instant at which it began, for every pair, whatever the guest does") {
  Rng rng(base_seed());
  for (const Kind& from : kinds())
    for (const Kind& to : kinds()) {
      const bool fresh = rng.one_in(2);
      CAPTURE(from.name);
      CAPTURE(to.name);
      CAPTURE(fresh);
      Live live(filled(from), to.make(kSize));
      if (!fresh) scribble(*live.target(), rng, 10);
      const auto before = content(*live);
      // Slow enough that the guest is at work in what has not been copied.
      const uint64_t id = live.start({.target_is_zero = fresh,
                                      .granularity = uint64_t{4096} << rng.below(8),
                                      .buffer = 1_MiB,
                                      .in_flight = 3,
                                      .rate = 1_MiB,
                                      .kind = JobKind::backup});
      CHECK(live.status().kind == "backup");
      for (int i = 0; i < 30; ++i) must(guest_request(*live, rng));
      const auto after = content(*live);
      (void)live.jobs().set_rate(id, 0);  // the guest may have saved all that there was

      CHECK(live.wait(JobState::finished).state == JobState::finished);
      CHECK(content(*live.target()) == before);
      CHECK(content(*live) == after);
    }
}

TEST_CASE("backup: what was a hole and changes is not copied with its cluster") {
  Live live(qcow2_disk({.size = kSize, .cluster_size = 4096}), qcow2_disk({.size = kSize, .cluster_size = 1 << 20}));
  must(live->write(GuestOffset(0), pattern(4096, 1)));  // the rest of the target's cluster is a hole
  const auto before = content(*live);
  live.source().faults->fail_call(1, ErrorCode::io, {Call::read});
  const uint64_t id = live.mirror({.granularity = 4096, .on_error = OnError::stop, .kind = JobKind::backup});
  REQUIRE(live.wait(JobState::paused).state == JobState::paused);

  must(live->write(GuestOffset(64_KiB), pattern(4096, 2)));
  must(live->write(GuestOffset(0), pattern(4096, 3)));
  must(live.jobs().resume(id));

  CHECK(live.wait(JobState::finished).state == JobState::finished);
  CHECK(content(*live.target()) == before);
}

TEST_CASE("backup: beside a guest with threads, what it holds is the disk of the beginning") {
  Live live(filled(kinds()[1]), kinds()[2].make(kSize));
  const auto before = content(*live);
  live.mirror({.granularity = 16384, .buffer = 256_KiB, .in_flight = 4, .kind = JobKind::backup});
  Guest guest(*live, 4);
  CHECK(live.wait(JobState::finished).state == JobState::finished);
  guest.stop();
  CHECK(guest.wrong() == 0);
  CHECK(content(*live.target()) == before);
}

TEST_CASE("backup: what cannot be saved ends it, and is no error of the guest") {
  for (const OnError policy : {OnError::report, OnError::stop, OnError::ignore}) {
    Live live(filled(kinds()[0]), raw_disk(kSize));
    const uint64_t id = live.mirror({.rate = 1, .on_error = policy, .kind = JobKind::backup});
    must(live.jobs().pause(id));
    must(live->write(GuestOffset(0), pattern(kSize, 1)));
    CHECK(live.status().remaining == 0);  // a guest does not wait for a pause to end
    must(live.jobs().resume(id));
    CHECK(live.wait(JobState::finished).state == JobState::finished);

    Live other(filled(kinds()[0]), raw_disk(kSize));
    other.mirror({.rate = 1, .on_error = policy, .kind = JobKind::backup});
    other.target().faults->fail_call(1, ErrorCode::no_space, {Call::write | Call::zero, false, true});
    must(other->write(GuestOffset(0), pattern(kSize, 1)));
    const JobStatus status = other.wait(JobState::failed);
    CHECK(status.state == JobState::failed);
    REQUIRE(status.error);
    CHECK(status.error->code() == ErrorCode::no_space);
    CHECK(content(*other) == pattern(kSize, 1));
  }
}

TEST_CASE("backup: what it refuses") {
  Live live(filled(kinds()[1]), kinds()[2].make(kSize));
  CHECK(live.jobs().start({.target = "target", .sync = MirrorSync::none, .kind = JobKind::backup}).error().code() ==
        ErrorCode::invalid);
  const uint64_t id = live.mirror({.rate = 1, .kind = JobKind::backup});
  CHECK(live.jobs().complete(id).error().code() == ErrorCode::invalid);
  CHECK(live->resize(2 * kSize).error().text() == "resize: a backup runs on this disk");
  must(live.jobs().cancel(id));
  CHECK(live.wait(JobState::cancelled).state == JobState::cancelled);
}

/// The parts of the disk that the bitmap has as changed.
std::vector<GuestRange> changed(Disk& disk, const std::string& bitmap) {
  return must(disk.bitmaps()->changed(bitmap, {GuestOffset(0), kSize}));
}

bool covers(const std::vector<GuestRange>& ranges, GuestRange wanted) {
  return std::any_of(ranges.begin(), ranges.end(), [&](const GuestRange& range) {
    return range.begin <= wanted.begin && wanted.end() <= range.end();
  });
}

TEST_CASE("incremental backup: one copy is brought from instant to instant, for every kind of target") {
  for (const Kind& to : kinds()) {
    CAPTURE(to.name);
    Rng rng(base_seed());
    CAPTURE(base_seed());
    Live live(filled(kinds()[2]), to.make(kSize));
    must(live->bitmaps()->add("b", uint64_t{512} << rng.below(9)));
    live.mirror({.kind = JobKind::backup});
    CHECK(live.wait(JobState::finished).state == JobState::finished);
    for (int round = 0; round < 5; ++round) {
      for (int i = 0; i < 4; ++i) must(guest_request(*live, rng));
      const auto then = content(*live);
      const uint64_t id = live.start({.granularity = uint64_t{4096} << rng.below(6),
                                      .in_flight = 2,
                                      .rate = 1,
                                      .kind = JobKind::backup,
                                      .bitmap = "b"});
      for (int i = 0; i < 4; ++i) must(guest_request(*live, rng));
      (void)live.jobs().set_rate(id, 0);  // the guest may have saved all that there was

      CHECK(live.wait(JobState::finished).state == JobState::finished);
      REQUIRE(content(*live.target()) == then);
    }
  }
}

TEST_CASE("incremental backup: copies what has changed and nothing else, and the bitmap then has what changed since") {
  Live live(filled(kinds()[2]), raw_disk(kSize));
  must(live->bitmaps()->add("b", 65536));
  must(live->write(GuestOffset(1_MiB + 5), pattern(100, 1)));
  live.target().faults->fail_call(1, ErrorCode::io, {Call::write});
  const uint64_t id = live.start({.on_error = OnError::stop, .kind = JobKind::backup, .bitmap = "b"});
  REQUIRE(live.wait(JobState::paused).state == JobState::paused);
  must(live->write(GuestOffset(2_MiB), pattern(100, 2)));
  must(live->write_zeroes({GuestOffset(3_MiB), 100}, Zeroing::may_free));
  must(live.jobs().resume(id));

  const JobStatus status = live.wait(JobState::finished);

  CHECK(status.state == JobState::finished);
  CHECK(status.copied == 65536);
  CHECK(live.target().memory->counts().bytes_written <= 65536);
  const auto since = changed(*live, "b");
  CHECK(since.size() == 2);
  CHECK(covers(since, {GuestOffset(2_MiB), 100}));
  CHECK(covers(since, {GuestOffset(3_MiB), 100}));
  must(live->write(GuestOffset(0), pattern(100, 3)));  // it goes on
  CHECK(covers(changed(*live, "b"), {GuestOffset(0), 100}));
}

TEST_CASE("incremental backup: one that fails or is cancelled loses nothing of what the bitmap says") {
  for (const bool cancelled : {false, true}) {
    CAPTURE(cancelled);
    Live live(filled(kinds()[2]), raw_disk(kSize));
    must(live->bitmaps()->add("b", 65536));
    must(live->write(GuestOffset(1_MiB), pattern(100000, 1)));
    must(live->write(GuestOffset(3_MiB), pattern(100, 1)));  // a second operation, for which the rate has it wait
    if (!cancelled) live.target().faults->fail_call(1, ErrorCode::io, {Call::write});
    const uint64_t id =
        live.start({.in_flight = 1, .rate = cancelled ? 1u : 0u, .kind = JobKind::backup, .bitmap = "b"});
    must(live->write(GuestOffset(2_MiB), pattern(100, 2)));
    if (cancelled) must(live.jobs().cancel(id));

    const JobState end = live.wait(JobState::cancelled).state;

    CHECK(end == (cancelled ? JobState::cancelled : JobState::failed));
    CHECK(covers(changed(*live, "b"), {GuestOffset(1_MiB), 100000}));
    CHECK(covers(changed(*live, "b"), {GuestOffset(2_MiB), 100}));
  }
}

TEST_CASE("incremental backup: a bitmap that is removed meanwhile, or has never been there") {
  Live live(filled(kinds()[2]), raw_disk(kSize));
  const auto error = live.jobs().start({.target = "target", .kind = JobKind::backup, .bitmap = "b"}).error();
  CHECK(error.text() == "there is no bitmap \"b\"");
  CHECK(live.target_closed());
  CHECK(live.jobs().list().empty());
  must(live->bitmaps()->add("b", 65536));
  must(live->write(GuestOffset(0), pattern(100, 1)));
  must(live->write(GuestOffset(1_MiB), pattern(100, 1)));
  const uint64_t id = live.start({.in_flight = 1, .rate = 1, .kind = JobKind::backup, .bitmap = "b"});
  must(live->bitmaps()->remove("b"));
  must(live.jobs().set_rate(id, 0));

  const JobStatus status = live.wait(JobState::failed);

  CHECK(status.state == JobState::failed);
  REQUIRE(status.error);
  CHECK(status.error->text() == "reset bitmap \"b\": there is no bitmap \"b\"");
  must(live->write(GuestOffset(0), pattern(100, 3)));

  Live raw(raw_disk(kSize), raw_disk(kSize));
  CHECK(raw.jobs().start({.target = "target", .kind = JobKind::backup, .bitmap = "b"}).error().text() ==
        "there are no bitmaps in raw images");
  CHECK(raw.jobs().start({.target = "target", .bitmap = "b"}).error().text() == "only a backup goes by a bitmap");
  CHECK(raw.jobs()
            .start({.target = "target", .sync = MirrorSync::top, .kind = JobKind::backup, .bitmap = "b"})
            .error()
            .code() == ErrorCode::invalid);
}

}  // namespace
}  // namespace imgfuse
