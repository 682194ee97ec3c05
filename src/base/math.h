// Arithmetic on sizes and positions. Callers have checked that nothing overflows, except where a name says `checked`.
#pragma once

#include <bit>
#include <cstdint>
#include <optional>

namespace imgfuse {

constexpr bool is_power_of_two(uint64_t n) { return std::has_single_bit(n); }
constexpr uint64_t divide_up(uint64_t n, uint64_t unit) { return n / unit + (n % unit != 0); }
constexpr uint64_t round_down(uint64_t n, uint64_t unit) { return n - n % unit; }
constexpr uint64_t round_up(uint64_t n, uint64_t unit) { return divide_up(n, unit) * unit; }

constexpr std::optional<uint64_t> checked_add(uint64_t a, uint64_t b) {
  uint64_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum)) return std::nullopt;
  return sum;
}
constexpr std::optional<uint64_t> checked_multiply(uint64_t a, uint64_t b) {
  uint64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

}  // namespace imgfuse
