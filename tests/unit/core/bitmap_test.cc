#include "core/bitmap.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include "support/random.h"

namespace imgfuse::test {

TEST_CASE("bitmap: searches and counts as a list of flags does") {
  Rng rng(base_seed());
  CAPTURE(base_seed());
  for (const uint64_t size : {0, 1, 63, 64, 65, 127, 128, 1000}) {
    Bitmap bits(size);
    std::vector<bool> model(size);
    for (int round = 0; round < 200; ++round) {
      const uint64_t begin = rng.below(size + 1);
      const uint64_t end = rng.between(begin, size);
      const bool value = rng.one_in(2);
      value ? bits.set(begin, end) : bits.clear(begin, end);
      std::fill(model.begin() + static_cast<long>(begin), model.begin() + static_cast<long>(end), value);

      CHECK(bits.count() == static_cast<uint64_t>(std::count(model.begin(), model.end(), true)));
      const uint64_t from = rng.below(size + 2);
      const auto first = [&](bool wanted) {
        uint64_t at = from;
        while (at < size && model[at] != wanted) ++at;
        return std::min(at, size);
      };
      CHECK(bits.next_set(from) == first(true));
      CHECK(bits.next_clear(from) == first(false));
      const uint64_t to = rng.between(std::min(from, size), size);
      CHECK(bits.next_set(from, to) == std::min(first(true), to));
      CHECK(bits.next_clear(from, to) == std::min(first(false), to));
      if (from < size) CHECK(bits.test(from) == model[from]);
      if (begin < end) {
        CHECK(bits.all(begin, end) == value);
        CHECK(bits.any(begin, end) == value);
      }
    }
  }
}

}  // namespace imgfuse::test
