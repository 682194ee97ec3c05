// A set of whole numbers, kept as ranges.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <optional>
#include <utility>

namespace imgfuse {

/// Neighbouring and overlapping ranges are one. Ranges are half-open. Not thread-safe. Costs a tree node per range.
class RangeSet {
 public:
  using Ranges = std::map<uint64_t, uint64_t>;  // begin and end

  bool empty() const { return ranges_.empty(); }
  size_t ranges() const { return ranges_.size(); }
  uint64_t numbers() const { return numbers_; }
  Ranges::const_iterator begin() const { return ranges_.begin(); }
  Ranges::const_iterator end() const { return ranges_.end(); }

  void add(uint64_t first, uint64_t last) {
    if (first >= last) return;
    auto at = ranges_.upper_bound(first);
    if (at != ranges_.begin() && std::prev(at)->second >= first) --at;
    while (at != ranges_.end() && at->first <= last) {
      first = std::min(first, at->first);
      last = std::max(last, at->second);
      numbers_ -= at->second - at->first;
      at = ranges_.erase(at);
    }
    ranges_.emplace_hint(at, first, last);
    numbers_ += last - first;
  }
  void remove(uint64_t first, uint64_t last) {
    if (first >= last) return;
    auto at = ranges_.upper_bound(first);
    if (at != ranges_.begin() && std::prev(at)->second > first) --at;
    while (at != ranges_.end() && at->first < last) {
      const auto [begin, end] = *at;
      numbers_ -= end - begin;
      at = ranges_.erase(at);
      if (begin < first) insert(begin, first);
      if (end > last) insert(last, end);
    }
  }
  void clear() {
    ranges_.clear();
    numbers_ = 0;
  }
  bool contains(uint64_t number) const { return overlap(number, number + 1).has_value(); }
  /// The first part of the set inside [first, last).
  std::optional<std::pair<uint64_t, uint64_t>> overlap(uint64_t first, uint64_t last) const {
    if (first >= last) return std::nullopt;
    auto at = ranges_.upper_bound(first);
    if (at != ranges_.begin() && std::prev(at)->second > first) --at;
    if (at == ranges_.end() || at->first >= last) return std::nullopt;
    return std::pair(std::max(first, at->first), std::min(last, at->second));
  }

 private:
  void insert(uint64_t begin, uint64_t end) {
    ranges_.emplace(begin, end);
    numbers_ += end - begin;
  }

  Ranges ranges_;
  uint64_t numbers_ = 0;
};

}  // namespace imgfuse
