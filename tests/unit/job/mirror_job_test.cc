// Mirrors at work, through Disk::jobs(): states, the pivot, errors.
#include <doctest/doctest.h>

#include <thread>

#include "base/buffer.h"
#include "base/mutex.h"
#include "imgfuse/snapshots.h"
#include "job/mirror_copy.h"
#include "live.h"
#include "support/gate_storage.h"

namespace imgfuse {
namespace {

using namespace imgfuse::test;

TEST_CASE("mirror job: becomes ready, and stays so until it is told") {
  Live live(filled(kinds()[1]), kinds()[2].make(kSize));
  const uint64_t id = live.mirror();
  CHECK(live.wait(JobState::ready).state == JobState::ready);
  must(live->write(GuestOffset(5000), pattern(100)));
  CHECK(live.status().kind == "mirror");

  must(live.jobs().finish(id));

  CHECK(live.wait(JobState::finished).state == JobState::finished);
  CHECK(live.target_closed());
  CHECK(content(*live.target()) == content(*live));
  must(live->write(GuestOffset(0), pattern(512, 9)));
  CHECK(content(*live.target()) != content(*live));
  CHECK(live.jobs().finish(id).error().text() == "job 1 is over");
  must(live->resize(2 * kSize));  // nothing holds it back
}

TEST_CASE("mirror job: a disk that ends inside a granule becomes ready too") {
  constexpr uint64_t kOdd = 1_MiB + 1536;
  Live live(raw_disk(kOdd), kinds()[2].make(kOdd));
  must(live->write(GuestOffset(0), pattern(kOdd)));

  live.mirror({.when_ready = WhenReady::finish});

  CHECK(live.wait(JobState::finished).state == JobState::finished);
  CHECK(live.status().copied == kOdd);
  CHECK(content(*live.target()) == content(*live));
}

/// How much each call of one kind takes or gives, but for those that are too short to be data.
class Lengths final : public InterceptedStorage {
 public:
  Lengths(std::shared_ptr<Storage> inner, Call call) : InterceptedStorage(std::move(inner)), call_(call) {}
  std::vector<uint64_t> seen;

 private:
  Result<> before(Call call, HostRange range) override {
    if (call == call_ && range.length >= 32_KiB) seen.push_back(range.length);
    return {};
  }
  const Call call_;
};

TEST_CASE("mirror copy: data that lies together is one host read and one host write, however long") {
  const auto data = pattern(4_MiB);
  for (const uint64_t cluster_size : {4_KiB, 64_KiB, 1_MiB}) {
    CAPTURE(cluster_size);
    const MemImage empty = make_qcow2({.size = 4_MiB, .cluster_size = static_cast<uint32_t>(cluster_size)});
    auto from = std::make_shared<Lengths>(std::make_shared<MemStorage>(empty), Call::read);
    auto to = std::make_shared<Lengths>(std::make_shared<MemStorage>(empty), Call::write);
    const std::unique_ptr<Disk, CloseDisk> source(must(open_image(from, {})).release());
    const std::unique_ptr<Disk, CloseDisk> target(must(open_image(to, {})).release());
    must(source->write(GuestOffset(0), data));
    must(target->write(GuestOffset(4_MiB - 512), pattern(512)));  // whatever has to be made first
    from->seen.clear();
    to->seen.clear();

    Buffer buffer(1_MiB);
    for (uint64_t at = 0; at < 3_MiB; at += 1_MiB)
      must(job::copy_range(*source, *target, {GuestOffset(at), 1_MiB}, {buffer.bytes()}));

    CHECK(from->seen == std::vector<uint64_t>(3, 1_MiB));
    CHECK(to->seen == std::vector<uint64_t>(3, 1_MiB));
    CHECK(read_all(*target, GuestOffset(0), 3_MiB) == read_all(*source, GuestOffset(0), 3_MiB));
  }
}

/// Reads wait as on a slow host, until so many do at a time.
class Gathering final : public InterceptedStorage {
 public:
  Gathering(std::shared_ptr<Storage> inner, unsigned wanted) : InterceptedStorage(std::move(inner)), wanted_(wanted) {}
  unsigned most() const EXCLUDES(mutex_) {
    const Lock lock(mutex_);
    return most_;
  }

 private:
  Result<> before(Call call, HostRange) override EXCLUDES(mutex_) {
    if (call != Call::read) return {};
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(5);
    Lock lock(mutex_);
    most_ = std::max(most_, ++reading_);
    gathered_.notify_all();
    while (most_ < wanted_ && std::chrono::steady_clock::now() < end) gathered_.wait_until(lock, end);
    --reading_;
    return {};
  }

  const unsigned wanted_;
  mutable Mutex mutex_;
  ConditionVariable gathered_;
  unsigned reading_ GUARDED_BY(mutex_) = 0;
  unsigned most_ GUARDED_BY(mutex_) = 0;
};

TEST_CASE("mirror job: operations that wait for the host become as many as there may be") {
  JobDisk disk = raw_disk(kSize);
  must(disk->write(GuestOffset(0), pattern(kSize)));
  auto slow = std::make_shared<Gathering>(disk.faults, 16);
  disk.disk.reset(must(raw::open(slow, {})).release());
  Live live(std::move(disk), raw_disk(kSize));

  live.mirror({.granularity = 4096, .buffer = 64_KiB, .in_flight = 16, .when_ready = WhenReady::finish});

  CHECK(live.wait(JobState::finished).state == JobState::finished);
  CHECK(slow->most() == 16);
  CHECK(content(*live.target()) == content(*live));
}

TEST_CASE("mirror job: the pivot under load, for every pair: nothing fails, nothing is lost") {
  Rng rng(base_seed());
  for (const Kind& from : kinds()) {
    for (const Kind& to : kinds()) {
      const bool blocking = rng.one_in(2);
      CAPTURE(blocking);
      CAPTURE(from.name);
      CAPTURE(to.name);
      Live live(filled(from), to.make(kSize));
      Guest guest(*live);
      // Without blocking it might never catch up with the guest, unless all that the disk has is near enough.
      live.mirror({.granularity = 4096,
                   .buffer = blocking ? 256_KiB : kSize,
                   .write_blocking = blocking,
                   .when_ready = WhenReady::complete});
      const JobStatus status = live.wait(JobState::completed);
      const uint64_t then = guest.requests();
      while (guest.requests() < then + 20 && guest.wrong() == 0) std::this_thread::yield();
      guest.stop();

      CHECK(status.state == JobState::completed);
      CHECK(guest.wrong() == 0);
      CHECK(content(*live) == content(*live.target()));
      const auto before = content(*live.source());
      must(live->write(GuestOffset(0), pattern(512, 77)));
      CHECK(content(*live.source()) == before);
      CHECK(live->info().format == live.target()->info().format);
    }
  }
}

TEST_CASE("mirror job: finished under load, the target is the disk of one instant") {
  // The guest writes one number everywhere, then the next: a copy of an instant has at most two, in order.
  Live live(raw_disk(1_MiB), kinds()[2].make(1_MiB));
  std::atomic<bool> stop = false;
  std::thread guest([&] {
    for (uint64_t number = 1; !stop; ++number)
      for (uint64_t at = 0; at < 1_MiB; at += 16_KiB) {
        const std::vector<uint64_t> same(16_KiB / 8, number);
        (void)live->write(GuestOffset(at), std::as_bytes(std::span(same)));
      }
  });
  live.mirror({.granularity = 4096, .buffer = 1_MiB, .when_ready = WhenReady::finish});
  const JobStatus status = live.wait(JobState::finished);
  stop = true;
  guest.join();

  CHECK(status.state == JobState::finished);
  const auto copy = content(*live.target());
  uint64_t last = ~uint64_t{0};
  uint64_t changes = 0;
  for (uint64_t at = 0; at < 1_MiB; at += 8) {
    uint64_t number = 0;
    std::memcpy(&number, copy.data() + at, 8);
    if (last != ~uint64_t{0} && number != last) {
      ++changes;
      CHECK(number + 1 == last);
    }
    last = number;
  }
  CHECK(changes <= 1);
}

TEST_CASE("mirror job: cancelled, the disk is as if there had been none") {
  Live live(filled(kinds()[1]), kinds()[2].make(kSize));
  Guest guest(*live);
  const uint64_t id = live.mirror({.rate = 100_KiB});

  must(live.jobs().cancel(id));

  CHECK(live.wait(JobState::cancelled).state == JobState::cancelled);
  CHECK(live.target_closed());
  guest.stop();
  CHECK(guest.wrong() == 0);
  CHECK(live->info().format == "qcow2");
  must(live->write(GuestOffset(0), pattern(512)));
}

TEST_CASE("mirror job: paused and resumed without loss") {
  Live live(filled(kinds()[1]), kinds()[2].make(kSize));
  const uint64_t id = live.mirror({.rate = 1_MiB});
  must(live.jobs().pause(id));
  CHECK(live.status().state == JobState::paused);
  must(live->write(GuestOffset(kSize - 4096), pattern(4096, 3)));
  CHECK(live.jobs().complete(id));
  CHECK(live.status().state == JobState::paused);

  must(live.jobs().set_rate(id, 0));
  must(live.jobs().resume(id));

  CHECK(live.wait(JobState::completed).state == JobState::completed);
  CHECK(content(*live) == content(*live.source()));
  CHECK(live.jobs().resume(id).error().code() == ErrorCode::invalid);
}

TEST_CASE("mirror job: a disk that is closed cancels its mirror") {
  Live live(filled(kinds()[1]), kinds()[2].make(kSize));
  live.mirror({.rate = 10_KiB});

  must(live.close());

  CHECK(live.target_closed());
}

TEST_CASE("mirror job: one at a time, with options that make sense, onto a target that is large enough") {
  Live live(filled(kinds()[1]), raw_disk(kSize - 512));
  Jobs& jobs = live.jobs();
  CHECK(jobs.start({.target = "nowhere"}).error().text() == "nowhere: no such file");
  CHECK(jobs.start({.target = "target", .granularity = 3000}).error().code() == ErrorCode::invalid);
  CHECK(jobs.start({.target = "target", .granularity = 256}).error().code() == ErrorCode::invalid);
  CHECK(jobs.start({.target = "target", .in_flight = 0}).error().code() == ErrorCode::invalid);
  CHECK(jobs.start({.target = "target", .in_flight = 65}).error().code() == ErrorCode::invalid);
  CHECK(jobs.start({.target = "target", .buffer = 2_GiB}).error().code() == ErrorCode::invalid);
  CHECK(jobs.start({.target = "target", .granularity = 512, .buffer = 64_MiB}).error().text() ==
        "a buffer of 67108864 bytes has 131072 pieces of 512 bytes, more than 65536: take a larger granularity");
  CHECK(jobs.start({.target = "target"}).error().text() ==
        "target is too small: it has 4193792 bytes, the disk 4194304");
  CHECK(live.target_closed());
  CHECK(jobs.list().empty());
  CHECK(jobs.cancel(1).error().text() == "there is no job 1");

  Live good(filled(kinds()[1]), raw_disk(kSize));
  const uint64_t id = good.mirror({.rate = 1});
  CHECK(good.jobs().start({.target = "target"}).error().code() == ErrorCode::busy);
  CHECK(good->resize(2 * kSize).error().code() == ErrorCode::busy);
  must(good.jobs().cancel(id));
  good.wait(JobState::cancelled);
  CHECK(good.mirror({.when_ready = WhenReady::finish}) == 2);
  CHECK(good.wait(JobState::finished).state == JobState::finished);
  CHECK(good.jobs().list().size() == 2);
}

TEST_CASE("mirror job: the rate holds for all that there was at first, however large the buffer") {
  Live live(filled(kinds()[1]), kinds()[2].make(kSize));
  const uint64_t id = live.mirror({.in_flight = 1, .rate = 1, .when_ready = WhenReady::complete});
  while (live.status().copied == 0) std::this_thread::yield();

  CHECK(live.status().state == JobState::running);  // though all of it fits into the buffer

  must(live.jobs().set_rate(id, 0));
  CHECK(live.wait(JobState::completed).state == JobState::completed);
}

TEST_CASE("mirror job: who shows the disk is asked for what it holds back, and told of the pivot") {
  for (const WhenReady end : {WhenReady::finish, WhenReady::complete}) {
    Live live(filled(kinds()[1]), raw_disk(kSize));
    std::atomic<int> settled = 0;
    std::atomic<int> replaced = 0;
    const auto late = pattern(4096, 99);
    live.jobs().set_hooks({[&] {
                             ++settled;
                             return live->write(GuestOffset(8192), late);
                           },
                           [&] {
                             ++replaced;
                             CHECK(live->info().format == "raw");
                           }});
    live.mirror({.when_ready = end});
    live.wait(JobState::finished);
    CHECK(is_over(live.status().state));
    CHECK(settled == 1);
    CHECK(replaced == (end == WhenReady::complete ? 1 : 0));
    CHECK(read_all(*live.target(), GuestOffset(8192), 4096) == late);
  }
}

TEST_CASE("mirror job: what cannot settle does not end it as if all were well") {
  Live live(filled(kinds()[1]), raw_disk(kSize));
  live.jobs().set_hooks({[] { return Result<>(fail(ErrorCode::io, "stuck")); }, [] {}});
  live.mirror({.when_ready = WhenReady::finish});
  const JobStatus status = live.wait(JobState::failed);
  CHECK(status.state == JobState::failed);
  REQUIRE(status.error);
  CHECK(status.error->text() == "stuck");
}

TEST_CASE("mirror job: ended for good there is no other") {
  Live live(filled(kinds()[1]), kinds()[2].make(kSize));
  live.mirror({.rate = 1});
  live.jobs().end();
  CHECK(live.status().state == JobState::cancelled);
  CHECK(live.jobs().start({.target = "target"}).error().code() == ErrorCode::busy);
  must(live->write(GuestOffset(0), pattern(512)));
}

TEST_CASE("mirror job: not completed while a snapshot's file is open") {
  Live live(filled(kinds()[1]), raw_disk(kSize));
  must(live->snapshots()->create("a"));
  auto snapshot = must(live->snapshots()->open("a"));
  const uint64_t id = live.mirror({.when_ready = WhenReady::complete});
  const JobStatus status = live.wait(JobState::paused);
  CHECK(status.state == JobState::paused);
  REQUIRE(status.error);
  CHECK(status.error->code() == ErrorCode::busy);
  must(live->write(GuestOffset(0), pattern(512)));

  must(snapshot->close());
  must(live.jobs().resume(id));

  CHECK(live.wait(JobState::completed).state == JobState::completed);
}

/// Whether the disk has latched an error: nothing can be written to it until it is opened again.
bool is_broken(Disk& disk) { return !disk.flush(); }

/// Resumes the job whenever an error has paused it, until it is over. Cancels it if its target is broken for good.
JobStatus see_through(Live& live, uint64_t id, bool resume) {
  for (;;) {
    const JobStatus status = live.status();
    if (is_over(status.state)) return status;
    if (status.error && is_broken(*live.target())) (void)live.jobs().cancel(id);
    if (status.state == JobState::paused && resume) (void)live.jobs().resume(id);
    std::this_thread::yield();
  }
}

TEST_CASE("mirror job: an error at any call of either side, under each policy, costs the guest nothing") {
  for (const OnError policy : {OnError::report, OnError::stop, OnError::ignore, OnError::enospc}) {
    for (const ErrorCode code : {ErrorCode::no_space, ErrorCode::io}) {
      for (const bool on_source : {false, true}) {
        bool fired = true;
        for (uint64_t n = 1; fired; n += (on_source ? 7 : 3) * fault_step()) {
          CAPTURE(static_cast<int>(policy));
          CAPTURE(static_cast<int>(code));
          CAPTURE(on_source);
          CAPTURE(n);
          Live live(filled(kinds()[on_source ? 1 : 0]), kinds()[on_source ? 0 : 2].make(kSize));
          FaultStorage& faults = on_source ? *live.source().faults : *live.target().faults;
          const auto before = content(*live);
          // Reads alone: what a source cannot read is no error of its guest's writes.
          const CallSet calls = on_source ? CallSet(Call::read) : CallSet(Call::read | Call::write | Call::zero);
          faults.fail_call(n, code, {calls});
          const uint64_t id = live.mirror({.granularity = 16384,
                                           .buffer = 128_KiB,
                                           .write_blocking = n % 2 == 0,
                                           .on_error = policy,
                                           .when_ready = WhenReady::finish});
          const bool pauses = policy == OnError::stop || (policy == OnError::enospc && code == ErrorCode::no_space);
          const JobStatus status = see_through(live, id, pauses);
          fired = faults.fired();
          faults.heal();

          if (!fired || status.state == JobState::finished) {
            CHECK(status.state == JobState::finished);
            // That there is no space for what a target does ahead of need is nobody's trouble.
            const bool may_be_ahead = !on_source && code == ErrorCode::no_space;
            CHECK((!fired || pauses || policy == OnError::ignore || may_be_ahead));
            CHECK(content(*live.target()) == before);
          } else if (pauses || policy == OnError::ignore) {
            CHECK(status.state == JobState::cancelled);
            CHECK(is_broken(*live.target()));
          } else {
            CHECK(status.state == JobState::failed);
            CHECK(status.error->code() == code);
          }
          CHECK(content(*live) == before);
          must(live->write(GuestOffset(0), pattern(512)));
        }
      }
    }
  }
}

TEST_CASE("mirror job: write-blocking, a write is on both sides when it returns") {
  Live live(filled(kinds()[0]), kinds()[0].make(kSize));
  const uint64_t id = live.mirror({.write_blocking = true});
  live.wait(JobState::ready);
  while (live.status().remaining > 0) std::this_thread::yield();
  must(live.jobs().set_rate(id, 1));  // nobody else copies any more

  must(live->write(GuestOffset(12345), pattern(5000, 5)));
  must(live->write_zeroes({GuestOffset(20000), 100}, Zeroing::may_free));

  CHECK(content(*live.target()) == content(*live));
  CHECK(live.status().remaining == 0);
}

TEST_CASE("mirror job: a write that fails on the target only is no error of the guest, and is made up for") {
  Live live(filled(kinds()[0]), kinds()[0].make(kSize));
  const uint64_t id = live.mirror({.write_blocking = true, .on_error = OnError::stop});
  live.wait(JobState::ready);
  while (live.status().remaining > 0) std::this_thread::yield();
  live.target().faults->fail_call(1, ErrorCode::io, {Call::write});

  CHECK(live->write(GuestOffset(4096), pattern(4096, 6)).has_value());

  CHECK(live.wait(JobState::paused).state == JobState::paused);
  CHECK(live.status().remaining > 0);
  must(live.jobs().resume(id));
  must(live.jobs().finish(id));
  CHECK(live.wait(JobState::finished).state == JobState::finished);
  CHECK(content(*live.target()) == content(*live));
}

}  // namespace
}  // namespace imgfuse
