// How often each host cluster is referenced, as a check counts it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace imgfuse::qcow2 {

/// What all counters of one check may use together. An image can ask for any amount, so there is a limit.
class MemoryBudget {
 public:
  explicit MemoryBudget(uint64_t bytes) : left_(bytes) {}
  /// False, and from then on exhausted(), when not enough is left.
  bool take(uint64_t bytes);
  void give_back(uint64_t bytes) { left_ += bytes; }
  bool exhausted() const { return exhausted_; }

 private:
  uint64_t left_;
  bool exhausted_ = false;
};

/// A sparse array of counters up to 2^32 - 1, where they stay. Pages of counters exist where there are references;
/// each page is as wide as its largest counter needs, from one bit on, since most clusters are referenced once.
/// When the budget is exhausted, add() does nothing: whoever counts looks at the budget from time to time.
class ReferenceCounts {
 public:
  static constexpr uint64_t kPageClusters = 16384;
  static constexpr uint64_t kMaxCount = (uint64_t{1} << 32) - 1;
  static constexpr uint64_t kMaxClusters = (uint64_t{1} << 31) - 1;

  explicit ReferenceCounts(MemoryBudget& budget) : budget_(budget) {}
  ~ReferenceCounts() { clear(); }
  ReferenceCounts(const ReferenceCounts&) = delete;
  ReferenceCounts& operator=(const ReferenceCounts&) = delete;

  /// `cluster` is below kMaxClusters plus a few.
  void add(uint64_t cluster, uint64_t times = 1);
  uint64_t get(uint64_t cluster) const;
  /// The first cluster from `cluster` on that has references.
  std::optional<uint64_t> next(uint64_t cluster) const;
  /// Past the last cluster that has references.
  uint64_t end() const { return end_; }
  void clear();

 private:
  struct Page {
    uint32_t bits = 0;  // per counter; 0: all counters are zero
    std::unique_ptr<std::byte[]> counters;
    size_t size() const { return kPageClusters * bits / 8; }
  };
  bool widen(Page& page, uint64_t largest);

  MemoryBudget& budget_;
  std::vector<Page> pages_;
  uint64_t end_ = 0;
};

}  // namespace imgfuse::qcow2
