// What a change of trees does to reference counts, for a bounded number of host clusters at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace imgfuse::qcow2 {

/// For each host cluster of a window: how many references it gains or loses, and whether one is left. Images with more
/// clusters are gone through window by window, so that memory does not grow with them. One thread.
class CountWindow {
 public:
  /// 96 MiB in all: 1 TiB of image with clusters of 64 KiB. A multiple of the counts in any refcount block.
  static constexpr uint64_t kClusters = uint64_t{16} << 20;

  void open(uint64_t first, uint64_t count) {
    first_ = first;
    sums_.assign(count, 0);
    unshared_.assign(count, 0);
    metadata_.assign(count, 0);
  }

  uint64_t first() const { return first_; }
  uint64_t end() const { return first_ + sums_.size(); }
  bool contains(uint64_t cluster) const { return cluster - first_ < sums_.size(); }

  /// Adds to the clusters of the run that are in the window. One pass over memory: a full image has a million of them
  /// in a few runs.
  void add(uint64_t cluster, uint64_t count, int32_t references) {
    const auto [begin, stop] = part(cluster, count);
    int32_t largest = 0;
    for (uint64_t i = begin; i < stop; ++i) {
      const int32_t sum = sums_[i] + references;
      sums_[i] = sum;
      largest |= sum < 0 ? -sum : sum;
    }
    overflowed_ |= largest >= kMaxSum;  // steps are small, so that no sum gets past this unseen
  }
  int32_t sum(uint64_t cluster) const { return sums_[cluster - first_]; }
  bool overflowed() const { return overflowed_; }

  /// One reference is left or there is only one: a COPIED flag is right. The cluster is in the window.
  bool unshared(uint64_t cluster) const { return unshared_[cluster - first_] != 0; }
  void set_unshared(uint64_t cluster, bool unshared) { unshared_[cluster - first_] = unshared; }

  /// Clusters that hold metadata, so that no data can lie there.
  bool has_metadata(uint64_t cluster, uint64_t count) const {
    const auto [begin, stop] = part(cluster, count);
    uint8_t any = 0;
    for (uint64_t i = begin; i < stop; ++i) any |= metadata_[i];
    return any != 0;
  }
  void set_metadata(uint64_t cluster) { metadata_[cluster - first_] = 1; }

 private:
  static constexpr int32_t kMaxSum = 1 << 30;

  std::pair<uint64_t, uint64_t> part(uint64_t cluster, uint64_t count) const {
    const uint64_t begin = std::max(cluster, first_);
    const uint64_t stop = std::min(cluster + count, end());
    return begin < stop ? std::pair(begin - first_, stop - first_) : std::pair(uint64_t{0}, uint64_t{0});
  }

  uint64_t first_ = 0;
  std::vector<int32_t> sums_;
  std::vector<uint8_t> unshared_;  // bytes: bits would cost more time than they save memory
  std::vector<uint8_t> metadata_;
  bool overflowed_ = false;
};

}  // namespace imgfuse::qcow2
