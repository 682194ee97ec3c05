// Splitting a range at unit borders.
#pragma once

#include "base/math.h"
#include "imgfuse/units.h"

namespace imgfuse {

/// A range as a partial unit at its front, whole units, and a partial unit at its end; each may be empty. A range
/// inside one unit is all head.
struct Pieces {
  GuestRange head, whole, tail;
};

constexpr Pieces split(GuestRange range, uint64_t unit) {
  const uint64_t begin = range.begin.bytes();
  const uint64_t end = range.end().bytes();
  const uint64_t first = round_up(begin, unit);
  const uint64_t last = round_down(end, unit);
  if (first > last) return {range, {range.end(), 0}, {range.end(), 0}};
  return {{range.begin, first - begin}, {GuestOffset(first), last - first}, {GuestOffset(last), end - last}};
}

/// The smallest range of whole units around `range`.
constexpr GuestRange round_out(GuestRange range, uint64_t unit) {
  const uint64_t begin = round_down(range.begin.bytes(), unit);
  return {GuestOffset(begin), round_up(range.end().bytes(), unit) - begin};
}

}  // namespace imgfuse
