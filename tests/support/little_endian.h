// Looking at and damaging little-endian images byte by byte.
#pragma once

#include <cstdint>
#include <span>

#include "base/endian.h"
#include "support/mem_storage.h"

namespace imgfuse::test {

template <class T>
T peek_le(const MemImage& image, uint64_t offset) {
  le<T> value;
  image.read(offset, std::as_writable_bytes(std::span(&value, 1)));
  return value;
}

template <class T>
void poke_le(MemImage& image, uint64_t offset, T value) {
  const le<T> raw = value;
  image.write(offset, std::as_bytes(std::span(&raw, 1)));
}

}  // namespace imgfuse::test
