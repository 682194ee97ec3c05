// Bits that are searched and counted.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace imgfuse {

/// Clear at first. Memory that never had a bit set is not touched, so the host need not provide it. One thread.
class Bitmap {
 public:
  explicit Bitmap(uint64_t size);

  uint64_t size() const { return size_; }
  /// How many are set.
  uint64_t count() const { return count_; }
  bool test(uint64_t bit) const { return (words_[bit / 64] >> bit % 64 & 1) != 0; }
  /// [begin, end), which lies inside.
  void set(uint64_t begin, uint64_t end);
  void clear(uint64_t begin, uint64_t end);
  /// The first one at or behind `from`; size() if there is none.
  uint64_t next_set(uint64_t from) const { return next_set(from, size_); }
  uint64_t next_clear(uint64_t from) const { return next_clear(from, size_); }
  /// The first one in [from, to); `to` if there is none. Looks no further, however large the bitmap is.
  uint64_t next_set(uint64_t from, uint64_t to) const { return find(from, to, 0); }
  uint64_t next_clear(uint64_t from, uint64_t to) const { return find(from, to, ~uint64_t{0}); }
  bool any(uint64_t begin, uint64_t end) const { return next_set(begin, end) < end; }
  bool all(uint64_t begin, uint64_t end) const { return next_clear(begin, end) >= end; }

 private:
  struct Free {
    void operator()(uint64_t* p) const { std::free(p); }
  };
  /// The first bit in [from, to) that differs from those of `skipped`.
  uint64_t find(uint64_t from, uint64_t to, uint64_t skipped) const;
  /// Calls `change` on each word that the range touches, with a mask of the bits in it.
  template <class Change>
  void for_each_word(uint64_t begin, uint64_t end, Change change);

  const uint64_t size_;
  uint64_t count_ = 0;
  std::unique_ptr<uint64_t[], Free> words_;  // bit k of word i is bit 64 i + k
};

}  // namespace imgfuse
