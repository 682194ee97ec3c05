// Integers as they lie on disk: alignment 1, converted on use.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <cstring>

namespace imgfuse {

template <std::unsigned_integral T>
constexpr T byte_swap(T value) {
  if constexpr (sizeof(T) == 1) return value;
  if constexpr (sizeof(T) == 2) return __builtin_bswap16(value);
  if constexpr (sizeof(T) == 4) return __builtin_bswap32(value);
  if constexpr (sizeof(T) == 8) return __builtin_bswap64(value);
}

template <std::unsigned_integral T, std::endian kOrder>
class OnDisk {
 public:
  OnDisk() = default;
  OnDisk(T value) { *this = value; }  // NOLINT(google-explicit-constructor): reads like an integer
  OnDisk& operator=(T value) {
    if constexpr (kOrder != std::endian::native) value = byte_swap(value);
    std::memcpy(bytes_, &value, sizeof value);
    return *this;
  }
  operator T() const {  // NOLINT(google-explicit-constructor)
    T value;
    std::memcpy(&value, bytes_, sizeof value);
    if constexpr (kOrder != std::endian::native) value = byte_swap(value);
    return value;
  }

 private:
  unsigned char bytes_[sizeof(T)] = {};
};

template <std::unsigned_integral T>
using be = OnDisk<T, std::endian::big>;
template <std::unsigned_integral T>
using le = OnDisk<T, std::endian::little>;

}  // namespace imgfuse
