// Whether a file is read in order or all over the place.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace imgfuse {

/// Looks at where each read begins that had to wait for the disk. One near the end of another one goes on with it: a
/// few such streams are known at a time. A read that does not is a jump; after some of them the file counts as
/// scattered, until streams prevail. Any thread may call. A guess: threads that note at once may spoil each other's.
class AccessPattern {
 public:
  /// Notes the read, and says whether reads are scattered.
  bool note(uint64_t offset, size_t length) {
    unsigned jumps = jumps_.load(std::memory_order_relaxed);
    if (std::atomic<uint64_t>* const stream = find_stream(offset)) {
      if (stream->load(std::memory_order_relaxed) == offset + length) return jumps >= kMany;  // the same one again
      stream->store(offset + length, std::memory_order_relaxed);
      jumps -= std::min(jumps, kWeight);
    } else {
      const unsigned next = next_.fetch_add(1, std::memory_order_relaxed);
      streams_[next % streams_.size()].store(offset + length, std::memory_order_relaxed);
      jumps = std::min(jumps + 1, 2 * kMany);
    }
    jumps_.store(jumps, std::memory_order_relaxed);
    return jumps >= kMany;
  }

 private:
  static constexpr uint64_t kNear = uint64_t{1} << 20;
  static constexpr unsigned kMany = 8;
  static constexpr unsigned kWeight = 2;  // of a read that goes on, against jumps

  std::atomic<uint64_t>* find_stream(uint64_t offset) {
    const auto is_near = [&](const std::atomic<uint64_t>& end) {
      return offset + kNear - end.load(std::memory_order_relaxed) <= 2 * kNear;
    };
    const auto found = std::find_if(streams_.begin(), streams_.end(), is_near);
    return found != streams_.end() ? &*found : nullptr;
  }

  std::array<std::atomic<uint64_t>, 4> streams_ = {};  // where they have come to
  std::atomic<unsigned> next_ = 0;
  std::atomic<unsigned> jumps_ = 0;
};

}  // namespace imgfuse
