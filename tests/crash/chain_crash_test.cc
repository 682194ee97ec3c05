// Power cuts while a chain of images is streamed or committed: whatever a crash leaves, the image that was mounted
// reads as its guest wrote it, and the job can be started again.
#include <doctest/doctest.h>

#include <atomic>
#include <future>
#include <mutex>
#include <thread>

#include "imgfuse/jobs.h"
#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/model_disk.h"
#include "support/test_chain.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kSize = 1_MiB;

MemImage flat(Disk& disk) {
  auto storage = MemStorage();
  must(storage.resize(kSize));
  must(storage.write(HostOffset(0), read_all(disk, GuestOffset(0), kSize)));
  return storage.image();
}

struct Case {
  JobKind kind;
  const char* format;              ///< of all images but a raw one
  std::vector<uint32_t> clusters;  ///< cluster sizes from the top down; the lowest is raw if it is 0
  std::optional<std::string> base = {};
};

class ChainCrash {
 public:
  ChainCrash(const Case& of, uint64_t seed) : kind_(of.kind), base_(of.base), rng_(seed), crash_rng_(seed + 1) {
    layers_.resize(of.clusters.size());
    for (size_t i = of.clusters.size(); i-- > 0;) {
      const std::string format = of.clusters[i] == 0 ? "raw" : of.format;
      const bool is_last = i + 1 == of.clusters.size();
      const auto storage = std::make_shared<MemStorage>(
          make_image(format, {.size = kSize,
                              .cluster_size = of.clusters[i],
                              .backing = is_last ? std::nullopt : std::optional(std::to_string(i + 1))}));
      layers_[i] = {std::to_string(i), format, storage};
      auto disk = must(TestChain({layers_.begin() + static_cast<long>(i), layers_.end()}).open_top());
      for (int n = 0; n < 6; ++n) {
        const uint64_t length = rng_.between(1, 100000);
        must(disk->write(GuestOffset(rng_.below(kSize - length)), pattern(length, rng_.next())));
      }
      if (i == 0) model_.emplace(kSize, std::vector<GuestRange>{{GuestOffset(0), kSize}}, flat(*disk));
      must(disk->close());
      storages_.insert(storages_.begin(), std::make_shared<CrashStorage>(storage->image()));
      layers_[i].storage = storages_.front();
    }
  }

  /// A guest writes and flushes beside the job, and after it. Returns how many states were looked at.
  uint64_t run() {
    const auto chain = std::make_shared<TestChain>(layers_);
    disk_ = with_jobs(must(chain->open_top()), {}, chain);
    for (const auto& storage : storages_) storage->set_observer([this] { look_aside(); });
    must(disk_->jobs()->start(options()));
    for (int i = 0; i < 60 && !is_over(state()); ++i) request();
    while (!is_over(state())) std::this_thread::yield();
    CHECK(state() == JobState::completed);
    for (int i = 0; i < 10; ++i) {
      request();
      for (const CrashMode mode : kCrashModes) look(mode);
    }
    must(disk_->close());
    for (const auto& storage : storages_) storage->set_observer({});
    look(CrashMode::none);
    return states_;
  }

 private:
  JobOptions options() const {
    return {.granularity = 16384, .buffer = 64_KiB, .in_flight = 3, .kind = kind_, .base = base_};
  }
  JobState state() const { return disk_->jobs()->list().back().state; }

  /// The model knows of a change before the disk does.
  void request() {
    const uint64_t length = 512 * rng_.between(1, 60);
    const GuestRange range{GuestOffset(512 * rng_.below((kSize - length) / 512 + 1)), length};
    const uint64_t what = rng_.below(5);
    if (what == 0) {
      must(disk_->flush());
      const std::lock_guard lock(mutex_);
      return model_->flushed();
    }
    const auto bytes = pattern(length, rng_.next());
    {
      const std::lock_guard lock(mutex_);
      what == 1 ? model_->zero(range) : model_->write(range.begin, bytes);
    }
    must(what == 1 ? disk_->write_zeroes(range, Zeroing::may_free) : disk_->write(range.begin, bytes));
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
    std::vector<TestChain::Layer> crashed = layers_;
    for (size_t i = 0; i < crashed.size(); ++i)
      crashed[i].storage = std::make_shared<MemStorage>(storages_[i]->crash(*mode, crash_rng_));
    const auto chain = std::make_shared<TestChain>(crashed);
    auto disk = must(chain->open_top());
    const std::string wrong = model_->compare(*disk);
    if (!wrong.empty()) {
      failed_ = true;
      FAIL_CHECK("state " << states_ << ": " << wrong);
    } else if (states_ % 16 == 0) {
      disk = again(std::move(disk), chain);
    }
    must(disk->close());
  }

  /// The job from its beginning, on what the crash has left. A stream that had come to its end has nothing to do, nor
  /// has an FVD image that is full.
  std::unique_ptr<Disk> again(std::unique_ptr<Disk> disk, const std::shared_ptr<TestChain>& chain) {
    const auto before = read_all(*disk, GuestOffset(0), kSize);
    auto live = with_jobs(std::move(disk), {}, chain);
    const auto started = live->jobs()->start(options());
    if (!started && !chain->backing_of_top()) return live;
    must(started);
    while (!is_over(live->jobs()->list().back().state)) std::this_thread::yield();
    CHECK(live->jobs()->list().back().state == JobState::completed);
    if (read_all(*live, GuestOffset(0), kSize) != before) {
      failed_ = true;
      FAIL_CHECK("state " << states_ << ": another content after the job was repeated");
    }
    return live;
  }

  const JobKind kind_;
  const std::optional<std::string> base_;
  std::vector<TestChain::Layer> layers_;
  std::vector<std::shared_ptr<CrashStorage>> storages_;
  std::unique_ptr<Disk> disk_;
  Rng rng_;
  std::atomic<bool> failed_ = false;

  std::mutex mutex_;  // for what follows
  Rng crash_rng_;
  std::optional<ModelDisk> model_;
  uint64_t states_ = 0;
};

TEST_CASE("stream, commit: after a crash at any moment the image reads as what was flushed, and the job can go on") {
  const std::vector<Case> cases = {
      {JobKind::stream, "qcow2", {65536, 0}},
      {JobKind::stream, "qcow2", {4096, 65536}},
      {JobKind::stream, "qcow2", {4096, 65536, 4096}, "2"},
      {JobKind::stream, "qed", {65536, 4096}},
      {JobKind::stream, "qed", {4096, 65536, 4096}, "2"},
      {JobKind::stream, "fvd", {65536, 0}},
      {JobKind::stream, "fvd", {4096, 65536, 4096}, "2"},
      {JobKind::commit, "qcow2", {65536, 0}},
      {JobKind::commit, "qcow2", {4096, 65536}},
      {JobKind::commit, "qcow2", {65536, 4096}},
      {JobKind::commit, "qcow2", {65536, 4096, 4096}, "2"},
      {JobKind::commit, "fvd", {65536, 0}},
      {JobKind::commit, "fvd", {65536, 4096, 4096}, "2"},
  };
  uint64_t states = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    INFO("IMG_SEED=" << base_seed() << ", case " << i);
    states += ChainCrash(cases[i], base_seed() + i).run();
  }
  MESSAGE(states << " crash states");
  CHECK(states > 1300);
}

}  // namespace
}  // namespace imgfuse::test
