// What a change of trees does to reference counts, for a bounded number of host clusters at a time.
#pragma once

#include <cstdint>
#include <vector>

namespace imgfuse::qcow2 {

/// For each host cluster of a window: how many references it gains or loses, and whether one is left. Images with more
/// clusters are gone through window by window, so that memory does not grow with them. One thread.
class CountWindow {
 public:
  /// 64 MiB of sums: 1 TiB of image with clusters of 64 KiB. A multiple of the counts in any refcount block.
  static constexpr uint64_t kClusters = uint64_t{16} << 20;

  void open(uint64_t first, uint64_t count) {
    first_ = first;
    sums_.assign(count, 0);
    unshared_.assign(count, false);
    metadata_.assign(count, false);
  }

  uint64_t first() const { return first_; }
  uint64_t end() const { return first_ + sums_.size(); }
  bool contains(uint64_t cluster) const { return cluster - first_ < sums_.size(); }

  /// Whether the sum still fits. The cluster is in the window, as for all that follow.
  bool add(uint64_t cluster, int32_t references) {
    int32_t& sum = sums_[cluster - first_];
    return !__builtin_add_overflow(sum, references, &sum);
  }
  int32_t sum(uint64_t cluster) const { return sums_[cluster - first_]; }

  /// One reference is left or there is only one: a COPIED flag is right.
  bool unshared(uint64_t cluster) const { return unshared_[cluster - first_]; }
  void set_unshared(uint64_t cluster, bool unshared) { unshared_[cluster - first_] = unshared; }

  /// The cluster holds metadata, so that no data can lie there.
  bool is_metadata(uint64_t cluster) const { return metadata_[cluster - first_]; }
  void set_metadata(uint64_t cluster) { metadata_[cluster - first_] = true; }

 private:
  uint64_t first_ = 0;
  std::vector<int32_t> sums_;
  std::vector<bool> unshared_;
  std::vector<bool> metadata_;
};

}  // namespace imgfuse::qcow2
