// Looking at and damaging images byte by byte.
#pragma once

#include <cstdint>
#include <span>

#include "base/endian.h"
#include "support/mem_storage.h"

namespace imgfuse::test {

inline constexpr uint64_t kCopiedBit = uint64_t{1} << 63;
inline constexpr uint64_t kCompressedBit = uint64_t{1} << 62;
inline constexpr uint64_t kAddressBits = 0x00fffffffffffe00;

template <class T>
T peek(const MemImage& image, uint64_t offset) {
  be<T> value;
  image.read(offset, std::as_writable_bytes(std::span(&value, 1)));
  return value;
}

template <class T>
void poke(MemImage& image, uint64_t offset, T value) {
  const be<T> raw = value;
  image.write(offset, std::as_bytes(std::span(&raw, 1)));
}

inline void poke_text(MemImage& image, uint64_t offset, std::string_view text) {
  image.write(offset, std::as_bytes(std::span(text)));
}

}  // namespace imgfuse::test
