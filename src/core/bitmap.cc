#include "core/bitmap.h"

#include <algorithm>
#include <bit>
#include <cassert>

#include "base/math.h"

namespace imgfuse {

Bitmap::Bitmap(uint64_t size) : size_(size) {
  // calloc() gets large pieces from the host as zeros that take no memory before they are written.
  words_.reset(static_cast<uint64_t*>(std::calloc(std::max<uint64_t>(1, divide_up(size, 64)), sizeof(uint64_t))));
  if (!words_) std::abort();
}

template <class Change>
void Bitmap::for_each_word(uint64_t begin, uint64_t end, Change change) {
  assert(end <= size_);
  if (begin >= end) return;
  const uint64_t last = end - 1;
  for (uint64_t word = begin / 64; word <= last / 64; ++word) {
    uint64_t mask = ~uint64_t{0};
    if (word == begin / 64) mask &= ~uint64_t{0} << begin % 64;
    if (word == last / 64) mask &= ~uint64_t{0} >> (63 - last % 64);
    change(words_[word], mask);
  }
}

void Bitmap::set(uint64_t begin, uint64_t end) {
  for_each_word(begin, end, [this](uint64_t& word, uint64_t mask) {
    count_ += static_cast<uint64_t>(std::popcount(mask & ~word));
    if ((mask & ~word) != 0) word |= mask;
  });
}

void Bitmap::clear(uint64_t begin, uint64_t end) {
  for_each_word(begin, end, [this](uint64_t& word, uint64_t mask) {
    count_ -= static_cast<uint64_t>(std::popcount(mask & word));
    if ((mask & word) != 0) word &= ~mask;
  });
}

uint64_t Bitmap::find(uint64_t from, uint64_t to, uint64_t skipped) const {
  assert(to <= size_);
  if (from >= to) return to;
  uint64_t wanted = (words_[from / 64] ^ skipped) & ~uint64_t{0} << from % 64;
  for (uint64_t word = from / 64;; wanted = words_[word] ^ skipped) {
    if (wanted != 0) return std::min(to, word * 64 + static_cast<uint64_t>(std::countr_zero(wanted)));
    if (++word * 64 >= to) return to;
  }
}

}  // namespace imgfuse
