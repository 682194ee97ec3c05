// Power cuts while a disk is mirrored and the target takes its place: what a flush has acknowledged is in the image
// that the guest has at that moment.
#include <doctest/doctest.h>

#include <atomic>
#include <functional>
#include <future>
#include <mutex>
#include <thread>

#include "format/raw/raw.h"
#include "imgfuse/jobs.h"
#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/model_disk.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kSize = 2_MiB;

/// A kind of image, on storage that can crash.
struct Side {
  const char* name;
  std::function<MemImage()> make;
  bool raw = false;

  std::unique_ptr<Disk> open(std::shared_ptr<Storage> storage) const {
    return raw ? must(raw::open(std::move(storage), {})) : must(open_image(std::move(storage)));
  }
};

MemImage empty_image() {
  MemImage image;
  image.resize(kSize);
  return image;
}

class MirrorCrash {
 public:
  MirrorCrash(const Side& from, const Side& to, uint64_t seed)
      : from_(from),
        to_(to),
        rng_(seed),
        crash_rng_(seed + 1),
        model_(kSize, {{GuestOffset(0), kSize}}, empty_image()) {}

  /// A guest writes and flushes until it does so in the target. Returns how many states were looked at.
  uint64_t run(bool write_blocking) {
    disk_ = with_jobs(from_.open(source_), [this](const std::string&, const auto&) {
      return Result<JobTarget>(JobTarget{to_.open(target_), false});
    });
    for (int i = 0; i < 30; ++i) request();
    source_->set_observer([this] { look_aside(); });
    target_->set_observer([this] { look_aside(); });
    must(disk_->jobs()->start({.target = "target",
                               .target_is_zero = true,
                               .granularity = 16384,
                               .buffer = 64_KiB,
                               .in_flight = 4,
                               .write_blocking = write_blocking,
                               .when_ready = WhenReady::complete}));
    // A guest that never rests need not let a mirror come to an end.
    for (int i = 0; i < 200 && state() != JobState::completed; ++i) request();
    while (!is_over(state())) std::this_thread::yield();
    CHECK(state() == JobState::completed);
    source_->set_observer({});
    for (const CrashMode mode : kCrashModes) look(mode);
    for (int i = 0; i < 10; ++i) {
      request();
      for (const CrashMode mode : kCrashModes) look(mode);
    }
    target_->set_observer({});
    must(disk_->close());
    return states_;
  }

 private:
  JobState state() const {
    const auto jobs = disk_->jobs()->list();
    return jobs.empty() ? JobState::running : jobs.back().state;
  }

  /// The model knows of a change before the disk does.
  void request() {
    const uint64_t length = 512 * rng_.between(1, 60);
    const GuestRange range{GuestOffset(512 * rng_.below((kSize - length) / 512 + 1)), length};
    switch (rng_.below(5)) {
      case 0: {
        must(disk_->flush());
        const std::lock_guard lock(mutex_);
        model_.flushed();
        break;
      }
      case 1: {
        {
          const std::lock_guard lock(mutex_);
          model_.zero(range);
        }
        must(disk_->write_zeroes(range, Zeroing::may_free));
        break;
      }
      default: {
        const auto bytes = pattern(length, rng_.next());
        {
          const std::lock_guard lock(mutex_);
          model_.write(range.begin, bytes);
        }
        must(disk_->write(range.begin, bytes));
      }
    }
  }

  /// In another thread, since this one may hold locks of the disk.
  void look_aside() {
    if (failed_) return;
    std::async(std::launch::async, [this] { look(); }).get();
  }
  void look(std::optional<CrashMode> mode = {}) {
    const std::lock_guard lock(mutex_);
    if (failed_) return;
    ++states_;
    if (!mode) mode = kCrashModes[crash_rng_.below(std::size(kCrashModes))];
    const JobState before = state();
    const std::string in_source =
        before == JobState::completed ? "it has been replaced" : wrong(from_, *source_, *mode);
    // While it concludes it may be either; whether it still did when the crash came is seen afterwards.
    const bool may_be_target = before >= JobState::concluding || state() >= JobState::concluding;
    if (in_source.empty()) return;
    const std::string in_target = may_be_target ? wrong(to_, *target_, *mode) : "not yet";
    if (in_target.empty()) return;
    failed_ = true;
    FAIL_CHECK("state " << states_ << ", source: " << in_source << ", target: " << in_target);
  }

  /// What a crash now has made of the image; empty if it holds what it must.
  std::string wrong(const Side& side, const CrashStorage& storage, CrashMode mode) {
    const auto disk = side.open(std::make_shared<MemStorage>(storage.crash(mode, crash_rng_)));
    std::string result = model_.compare(*disk);
    must(disk->close());
    return result;
  }

  const Side from_;
  const Side to_;
  const std::shared_ptr<CrashStorage> source_ = std::make_shared<CrashStorage>(from_.make());
  const std::shared_ptr<CrashStorage> target_ = std::make_shared<CrashStorage>(to_.make());
  std::unique_ptr<Disk> disk_;
  Rng rng_;
  std::atomic<bool> failed_ = false;

  std::mutex mutex_;  // for what follows
  Rng crash_rng_;
  ModelDisk model_;
  uint64_t states_ = 0;
};

TEST_CASE("mirror: after a crash at any moment the guest's image has what was flushed, before the pivot and after it") {
  const Side raw{"raw", empty_image, true};
  const Side small{"qcow2, 4k", [] { return make_qcow2({.size = kSize, .cluster_size = 4096}); }};
  const Side usual{"qcow2, 64k", [] { return make_qcow2({.size = kSize}); }};
  const Side qed{"qed, 64k", [] { return make_qed({.size = kSize}); }};
  const Side fvd{"fvd, 64k", [] { return FvdKind::image({.size = kSize}); }};
  const std::vector<std::pair<Side, Side>> pairs = {{raw, raw},     {raw, small},   {raw, usual}, {small, raw},
                                                    {small, small}, {small, usual}, {usual, raw}, {usual, small},
                                                    {usual, usual}, {qed, usual},   {usual, qed}, {qed, qed},
                                                    {fvd, raw},     {usual, fvd},   {fvd, fvd}};
  // Both ways of each pair in long runs, else one, in turn.
  const bool both = from_environment("IMG_CRASH_STATES", 0) > 100000;
  uint64_t states = 0;
  for (size_t i = 0; i < pairs.size(); ++i)
    for (const bool blocking : {false, true}) {
      if (!both && blocking != (i % 2 == 0)) continue;
      const auto& from = pairs[i].first;  // clang cannot show names of a structured binding in INFO
      const auto& to = pairs[i].second;
      INFO("IMG_SEED=" << base_seed() << ", " << from.name << " to " << to.name);
      CAPTURE(blocking);
      states += MirrorCrash(from, to, base_seed()).run(blocking);
    }
  MESSAGE(states << " crash states");
  CHECK(states > 500);
}

}  // namespace
}  // namespace imgfuse::test
