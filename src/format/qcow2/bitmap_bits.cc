#include "format/qcow2/bitmap_bits.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "base/math.h"

namespace imgfuse::qcow2 {

uint64_t BitmapBits::memory_for(uint64_t disk_size, unsigned granularity_bits) {
  return divide_up(divide_up(disk_size, uint64_t{1} << granularity_bits), 64) * 8;
}

BitmapBits::BitmapBits(uint64_t disk_size, unsigned granularity_bits)
    : granules_(divide_up(disk_size, uint64_t{1} << granularity_bits)), granularity_bits_(granularity_bits) {
  // calloc() gets large pieces from the host as zeros that take no memory before they are written.
  words_.reset(static_cast<uint64_t*>(std::calloc(std::max<uint64_t>(1, divide_up(granules_, 64)), sizeof(uint64_t))));
  if (!words_) std::abort();
}

/// Most writes meet bits that are set already: looking first keeps the cache line shared. Returns whether one was not.
bool BitmapBits::set_bits(uint64_t word, uint64_t mask) {
  const std::atomic_ref<uint64_t> bits(words_[word]);
  if ((bits.load(std::memory_order_relaxed) & mask) == mask) return false;
  bits.fetch_or(mask, std::memory_order_relaxed);
  return true;
}

void BitmapBits::set(GuestRange range) {
  if (range.empty()) return;
  const uint64_t first = range.begin.bytes() >> granularity_bits_;
  const uint64_t last = (range.end().bytes() - 1) >> granularity_bits_;
  assert(last < granules_);
  bool changed = false;
  for (uint64_t word = first / 64; word <= last / 64; ++word) {
    uint64_t mask = ~uint64_t{0};
    if (word == first / 64) mask &= ~uint64_t{0} << first % 64;
    if (word == last / 64) mask &= ~uint64_t{0} >> (63 - last % 64);
    changed |= set_bits(word, mask);
  }
  if (changed && !this->changed()) changed_.store(true, std::memory_order_relaxed);
}

void BitmapBits::save(uint64_t first, Bytes out) const {
  for (uint64_t i = 0; i < out.size(); ++i) {
    const uint64_t byte = first + i;
    if (byte >= bytes()) {
      out[i] = std::byte{0};
      continue;
    }
    const uint64_t word = std::atomic_ref<uint64_t>(words_[byte / 8]).load(std::memory_order_relaxed);
    out[i] = static_cast<std::byte>(word >> byte % 8 * 8);
  }
}

void BitmapBits::merge(uint64_t first, ConstBytes stored) {
  for (uint64_t i = 0; i < stored.size(); ++i) {
    const uint64_t byte = first + i;
    auto bits = static_cast<uint64_t>(stored[i]);
    if (bits == 0 || byte >= bytes()) continue;
    if (byte == bytes() - 1 && granules_ % 8 != 0) bits &= (1u << granules_ % 8) - 1;
    if (bits != 0) (void)set_bits(byte / 8, bits << byte % 8 * 8);
  }
}

}  // namespace imgfuse::qcow2
