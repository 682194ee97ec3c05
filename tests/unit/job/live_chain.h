// A chain of images whose top is a disk with jobs.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "imgfuse/jobs.h"
#include "mirrors.h"
#include "support/test_chain.h"

namespace imgfuse::test {

inline constexpr uint64_t kChainSize = 4_MiB;

/// How a chain is made: cluster sizes from the top down; the lowest one is raw if it is 0.
struct ChainShape {
  const char* name;
  std::vector<uint32_t> clusters;
  const char* format = "qcow2";  ///< of all but a raw one

  bool commits() const { return std::string(format) != "qed"; }  // cannot be emptied
};

inline const std::vector<ChainShape> kChainShapes = {
    {"on raw", {65536, 0}},
    {"small on large", {4096, 1 << 20}},
    {"large on small", {1 << 20, 4096}},
    {"three", {65536, 4096, 65536}},
    {"four, on raw", {4096, 65536, 1 << 20, 0}},
    {"QED", {65536, 4096, 65536}, "qed"},
    {"FVD on raw", {65536, 0}, "fvd"},
    {"three FVD", {65536, 4096, 65536}, "fvd"},
};

inline std::string name_of(size_t layer) { return "layer" + std::to_string(layer); }

/// Images with content in all of them; those in between are shorter than the others. The top is live.
class LiveChain {
 public:
  LiveChain(const ChainShape& shape, uint64_t seed) : rng_(seed) {
    std::vector<TestChain::Layer> layers(shape.clusters.size());
    for (size_t i = layers.size(); i-- > 0;) {
      const uint64_t size = size_of(shape, i);
      const bool is_last = i + 1 == layers.size();
      const std::string format = shape.clusters[i] == 0 ? "raw" : shape.format;
      MemImage image = make_image(format, {.size = size,
                                           .cluster_size = shape.clusters[i],
                                           .backing = is_last ? std::nullopt : std::optional(name_of(i + 1)),
                                           .backing_size = size_of(shape, i + 1)});
      auto faults = std::make_shared<FaultStorage>(std::make_shared<MemStorage>(std::move(image)));
      faults_.insert(faults_.begin(), faults);
      layers[i] = {name_of(i), format, faults};
      TestChain below({layers.begin() + static_cast<long>(i), layers.end()});
      auto disk = must(below.open_top());
      scribble(*disk, rng_, 8);
      must(disk->close());
    }
    chain_ = std::make_shared<TestChain>(layers);
    disk_ = with_jobs(must(chain_->open_top()), {}, chain_);
  }
  ~LiveChain() {
    if (disk_) (void)disk_->close();
  }
  Disk& operator*() { return *disk_; }
  Disk* operator->() { return disk_.get(); }
  Jobs& jobs() { return *disk_->jobs(); }
  Rng& rng() { return rng_; }
  TestChain& chain() { return *chain_; }
  FaultStorage& faults(size_t layer) { return *faults_[layer]; }
  Result<> close() { return std::exchange(disk_, nullptr)->close(); }

  JobStatus status() { return jobs().list().back(); }
  JobStatus wait(JobState state) {
    for (;;) {
      const JobStatus status = this->status();
      if (status.state == state || is_over(status.state)) return status;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  void work(int requests) {
    for (int i = 0; i < requests; ++i) must(guest_request(*disk_, rng_));
  }
  /// What an image reads as with those below it, opened by itself.
  std::vector<std::byte> image_content(size_t layer) {
    const auto& layers = chain_->layers();
    TestChain chain({layers.begin() + static_cast<long>(layer), layers.end()});
    auto disk = must(chain.open_top());
    auto bytes = content(*disk);
    must(disk->close());
    return bytes;
  }
  std::optional<std::string> backing_of_top() const { return chain_->backing_of_top(); }
  void check_images() {
    for (const auto& layer : chain_->layers())
      if (layer.format != "raw") CHECK(must(layer.driver().check(*layer.storage, Repair::none, {})).clean());
  }

 private:
  static uint64_t size_of(const ChainShape& shape, size_t layer) {
    const bool is_between = layer > 0 && layer + 1 < shape.clusters.size();
    const bool sees_all = shape.format != std::string("fvd");  // such an image remembers how much of its base counts
    return is_between && sees_all ? kChainSize - layer * 300_KiB : kChainSize;
  }

  Rng rng_;
  std::vector<std::shared_ptr<FaultStorage>> faults_;
  std::shared_ptr<TestChain> chain_;
  std::unique_ptr<Disk> disk_;
};

}  // namespace imgfuse::test
