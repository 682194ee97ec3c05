// Reading and writing many clusters of an image, neighbours together.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/buffer.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"
#include "imgfuse/units.h"

namespace imgfuse::qcow2 {

inline constexpr uint64_t kRunBytes = uint64_t{1} << 20;

/// Whether clusters that the host has no data for are shown, as zeros, or passed over.
enum class Holes { show, skip };

/// Shows the clusters at `place(i)`, for i from `first` to `end`, to `visit(i, bytes)`, in order. A place of 0 is
/// passed over. Clusters that lie behind each other are read at once.
template <class Place, class Visit>
Result<> for_each_cluster(Storage& storage, uint64_t cluster_size, uint64_t first, uint64_t end, Holes holes,
                          const Place& place, const Visit& visit) {
  constexpr uint64_t kWorthAsking = 64 << 10;  // below, reading costs less than asking for a hole
  const uint64_t longest = std::max<uint64_t>(1, kRunBytes / cluster_size);
  Buffer buffer(longest * cluster_size);
  for (uint64_t i = first; i < end;) {
    const uint64_t begin = place(i);
    if (begin == 0) {
      ++i;
      continue;
    }
    uint64_t run = 1;
    while (run < longest && i + run < end && place(i + run) == begin + run * cluster_size) ++run;
    const HostRange range{HostOffset(begin), run * cluster_size};
    bool data = true;
    if (holes == Holes::skip && range.length >= kWorthAsking) {
      IMG_LET(const StorageExtent extent, storage.extent(range));
      data = extent.data || extent.length < range.length;
    }
    if (data) {
      IMG_TRY(storage.read(range.begin, buffer.bytes().first(range.length)));
      for (uint64_t k = 0; k < run; ++k) IMG_TRY(visit(i + k, buffer.bytes().subspan(k * cluster_size, cluster_size)));
    }
    i += run;
  }
  return {};
}

/// Writes whole clusters, those that lie behind each other at once. Call finish() at the end. One thread.
class ClusterWriter {
 public:
  ClusterWriter(Storage& storage, uint64_t cluster_size)
      : storage_(storage), cluster_size_(cluster_size), buffer_(std::max(kRunBytes, cluster_size)) {}

  /// The memory for the cluster at `offset`, to be filled before the next call.
  Result<Bytes> next(HostOffset offset) {
    if (used_ > 0 && (offset != begin_ + used_ || used_ + cluster_size_ > buffer_.size())) IMG_TRY(finish());
    if (used_ == 0) begin_ = offset;
    used_ += cluster_size_;
    return buffer_.bytes().subspan(used_ - cluster_size_, cluster_size_);
  }

  Result<> finish() {
    if (used_ == 0) return {};
    const ConstBytes run = buffer_.bytes().first(used_);
    used_ = 0;
    return storage_.write(begin_, run);
  }

 private:
  Storage& storage_;
  const uint64_t cluster_size_;
  Buffer buffer_;
  HostOffset begin_;
  uint64_t used_ = 0;
};

}  // namespace imgfuse::qcow2
