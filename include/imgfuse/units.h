// Positions and ranges. A number that means a position carries its address space in its type.
#pragma once

#include <compare>
#include <cstdint>

namespace imgfuse {

/// A byte position in one address space. Positions of different spaces do not convert into each other.
template <class Space>
class Offset {
 public:
  constexpr Offset() = default;
  constexpr explicit Offset(uint64_t bytes) : bytes_(bytes) {}
  constexpr uint64_t bytes() const { return bytes_; }
  constexpr Offset operator+(uint64_t n) const { return Offset(bytes_ + n); }
  constexpr Offset operator-(uint64_t n) const { return Offset(bytes_ - n); }
  constexpr uint64_t operator-(Offset o) const { return bytes_ - o.bytes_; }
  constexpr auto operator<=>(const Offset&) const = default;

 private:
  uint64_t bytes_ = 0;
};

using GuestOffset = Offset<struct GuestSpace>;  ///< what the guest sees
using HostOffset = Offset<struct HostSpace>;    ///< where it lies in the image file

/// Half-open range of bytes `[begin, begin + length)` in one space.
template <class Space>
struct Range {
  Offset<Space> begin;
  uint64_t length = 0;

  constexpr Offset<Space> end() const { return begin + length; }
  constexpr bool empty() const { return length == 0; }
  constexpr bool contains(Offset<Space> o) const { return begin <= o && o < end(); }
  constexpr bool overlaps(const Range& o) const { return begin < o.end() && o.begin < end(); }
  constexpr bool operator==(const Range&) const = default;
};

using GuestRange = Range<struct GuestSpace>;
using HostRange = Range<struct HostSpace>;

inline namespace literals {
constexpr uint64_t operator""_KiB(unsigned long long n) { return n << 10; }
constexpr uint64_t operator""_MiB(unsigned long long n) { return n << 20; }
constexpr uint64_t operator""_GiB(unsigned long long n) { return n << 30; }
constexpr uint64_t operator""_TiB(unsigned long long n) { return n << 40; }
}  // namespace literals

}  // namespace imgfuse
