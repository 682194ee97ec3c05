// Loops over the counts of whole refcount blocks, compiled for each width.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/endian.h"
#include "format/qcow2/refcounts.h"

namespace imgfuse::qcow2 {

template <class T>
struct WideCounts {
  static uint64_t get(ConstBytes block, uint64_t index) {
    be<T> count;
    std::memcpy(&count, &block[index * sizeof count], sizeof count);
    return T{count};
  }
  static void set(Bytes block, uint64_t index, uint64_t value) {
    const be<T> count(static_cast<T>(value));
    std::memcpy(&block[index * sizeof count], &count, sizeof count);
  }
};

struct NarrowCounts {
  uint32_t bits;
  uint64_t get(ConstBytes block, uint64_t index) const { return get_refcount(block, index, bits); }
  void set(Bytes block, uint64_t index, uint64_t value) const { set_refcount(block, index, bits, value); }
};

/// Calls `loop` with what gets and sets counts of this width.
template <class Loop>
void with_refcount_width(uint32_t bits, const Loop& loop) {
  switch (bits) {
    case 64:
      return loop(WideCounts<uint64_t>());
    case 32:
      return loop(WideCounts<uint32_t>());
    case 16:
      return loop(WideCounts<uint16_t>());
    case 8:
      return loop(WideCounts<uint8_t>());
    default:
      return loop(NarrowCounts{bits});
  }
}

}  // namespace imgfuse::qcow2
