// Extents as Disk::map() gives them, gathered one by one.
#pragma once

#include <cstddef>
#include <vector>

#include "imgfuse/disk.h"

namespace imgfuse {

/// Neighbours that could be one extent become one. One thread.
class ExtentList {
 public:
  explicit ExtentList(size_t max_extents) : max_extents_(max_extents) {}

  /// There may be room for more: each lookup adds to the work, and neighbours merge, so their number does not bound it.
  bool wants_more() { return extents_.size() <= max_extents_ && lookups_++ < kMaxLookups; }
  void append(const Extent& next);
  /// Extents of `backing` at the front of `range`, which lies inside it, one layer deeper; returns how many bytes of
  /// the range they cover.
  Result<uint64_t> append_below(Disk& backing, GuestRange range);
  std::vector<Extent> take();

 private:
  static constexpr unsigned kMaxLookups = 4096;

  const size_t max_extents_;
  unsigned lookups_ = 0;
  std::vector<Extent> extents_;
};

}  // namespace imgfuse
