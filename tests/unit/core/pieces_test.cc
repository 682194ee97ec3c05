#include "core/pieces.h"

#include <doctest/doctest.h>

using namespace imgfuse;

namespace {
constexpr GuestRange range(uint64_t begin, uint64_t length) { return {GuestOffset(begin), length}; }
}  // namespace

TEST_CASE("pieces: head, whole units and tail cover a range without gaps or overlap") {
  for (uint64_t begin = 0; begin < 24; ++begin) {
    for (uint64_t length = 0; length < 40; ++length) {
      CAPTURE(begin);
      CAPTURE(length);
      const Pieces pieces = split(range(begin, length), 8);

      CHECK(pieces.head.begin.bytes() == begin);
      CHECK(pieces.head.end() == pieces.whole.begin);
      CHECK(pieces.whole.end() == pieces.tail.begin);
      CHECK(pieces.tail.end().bytes() == begin + length);
      CHECK(pieces.head.length < 8);
      CHECK(pieces.tail.length < 8);
      CHECK(pieces.whole.length % 8 == 0);
      if (!pieces.whole.empty()) CHECK(pieces.whole.begin.bytes() % 8 == 0);
    }
  }
}

TEST_CASE("pieces: rounding out gives the smallest whole units around a range") {
  CHECK(round_out(range(9, 1), 8) == range(8, 8));
  CHECK(round_out(range(7, 2), 8) == range(0, 16));
  CHECK(round_out(range(8, 8), 8) == range(8, 8));
}
