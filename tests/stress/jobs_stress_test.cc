// Jobs one after the other, with orders of all kinds, beside threads that write, read, zero and flush.
#include <doctest/doctest.h>

#include <thread>

#include "imgfuse/jobs.h"
#include "unit/job/live_chain.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kSize = 4_MiB;

/// Something that does not end it. What comes of it does not matter: it may be over already.
void disturb(Jobs& jobs, uint64_t job, Rng& rng) {
  switch (rng.below(4)) {
    case 0:
      (void)jobs.pause(job);
      break;
    case 1:
      (void)jobs.set_rate(job, rng.one_in(2) ? 0 : 100_MiB);
      break;
    case 2:
      (void)jobs.resume(job);
      break;
    default:
      std::this_thread::yield();
  }
}

JobState end_somehow(Jobs& jobs, uint64_t job, Rng& rng) {
  switch (rng.below(6)) {
    case 0:
      (void)jobs.cancel(job);
      break;
    case 1:
      (void)jobs.finish(job);
      break;
    default:
      (void)jobs.complete(job);
  }
  (void)jobs.set_rate(job, 0);
  while (!is_over(jobs.list().back().state)) {
    (void)jobs.resume(job);
    std::this_thread::yield();
  }
  return jobs.list().back().state;
}

TEST_CASE("mirror: threads see the disk that they have written, through any number of mirrors and pivots") {
  Rng rng(base_seed());
  INFO("IMG_SEED=" << base_seed());
  const auto another = [&] {
    return std::unique_ptr<Disk>(kinds()[rng.below(kinds().size())].make(kSize).disk.release());
  };
  auto live = with_jobs(another(), [&](const std::string&, const auto&) {
    return Result<JobTarget>({another(), false});
  });
  Jobs& jobs = *live->jobs();
  unsigned completed = 0;
  {
    Guest guest(*live, 4);
    for (uint64_t round = from_environment("IMG_RUNS", 4000) / 100; round > 0 && guest.wrong() == 0; --round) {
      const bool blocking = rng.one_in(2);  // without, it might never catch up with the threads unless all is near
      const uint64_t job = must(jobs.start({.target = "another",
                                            .target_is_zero = true,
                                            .granularity = uint64_t{512} << rng.below(10),
                                            .buffer = blocking ? 64_KiB << rng.below(5) : kSize,
                                            .in_flight = static_cast<unsigned>(rng.between(1, 20)),
                                            .write_blocking = blocking}));
      for (uint64_t i = rng.below(6); i > 0; --i) disturb(jobs, job, rng);
      const JobState end = end_somehow(jobs, job, rng);
      if (end == JobState::completed) ++completed;
      CHECK(end != JobState::failed);
    }
    guest.stop();
    CHECK(guest.wrong() == 0);
    CHECK(guest.requests() > 0);
  }
  CHECK(completed > 0);
  must(live->close());
}

/// Asks for everything that is there to be asked for.
class Watcher {
 public:
  explicit Watcher(Disk& disk) : thread_([this, &disk] { watch(disk); }) {}
  ~Watcher() {
    stop_ = true;
    thread_.join();
  }

 private:
  void watch(Disk& disk) {
    while (!stop_) {
      CHECK(disk.info().size == kChainSize);
      (void)disk.statistics();
      (void)disk.jobs()->list();
      (void)disk.count_allocated(stop_);
      CHECK(disk.allocated() <= 2 * kChainSize);
      std::this_thread::yield();
    }
  }

  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

TEST_CASE("stream, commit: threads see the disk that they have written, and so does who opens the image afterwards") {
  Rng rng(base_seed());
  INFO("IMG_SEED=" << base_seed());
  unsigned completed = 0;
  for (uint64_t round = from_environment("IMG_RUNS", 4000) / 100; round > 0; --round) {
    const ChainShape& shape = kChainShapes[rng.below(kChainShapes.size())];
    const bool commits = shape.commits() && rng.one_in(2);
    const size_t layers = shape.clusters.size();
    size_t base = rng.below(layers);  // 0: the usual one
    if (!commits && base == 1) base = 0;
    CAPTURE(std::string(shape.name));
    CAPTURE(commits);
    CAPTURE(base);
    LiveChain live(shape, rng.next());
    {
      Guest guest(*live, 4);
      const Watcher watcher(*live);
      const auto started = live.jobs().start({.granularity = uint64_t{512} << rng.below(10),
                                              .buffer = kChainSize,
                                              .in_flight = static_cast<unsigned>(rng.between(1, 20)),
                                              .kind = commits ? JobKind::commit : JobKind::stream,
                                              .base = base > 0 ? std::optional(name_of(base)) : std::nullopt});
      if (!started && !live.backing_of_top()) continue;  // an FVD image that is full, and has left its base
      const uint64_t job = must(started);
      for (uint64_t i = rng.below(6); i > 0; --i) disturb(live.jobs(), job, rng);
      if (rng.one_in(4)) (void)live.jobs().cancel(job);
      (void)live.jobs().set_rate(job, 0);
      while (!is_over(live.status().state)) {
        (void)live.jobs().resume(job);
        std::this_thread::yield();
      }
      CHECK(live.status().state != JobState::failed);
      if (live.status().state == JobState::completed) ++completed;
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
  CHECK(completed > 0);
}

}  // namespace
}  // namespace imgfuse::test
