#include "support/random.h"

#include <cstdlib>
#include <cstring>

namespace imgfuse::test {

uint64_t from_environment(const char* name, uint64_t fallback) {
  const char* text = std::getenv(name);
  return text && *text ? std::strtoull(text, nullptr, 0) : fallback;
}

uint64_t base_seed() { return from_environment("IMG_SEED", 20240607); }

std::vector<std::byte> pattern(size_t length, uint64_t seed) {
  std::vector<std::byte> bytes(length);
  uint64_t state = seed * 0x9e3779b97f4a7c15 + 0x1234567;
  for (size_t i = 0; i < length; i += 8) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    const uint64_t word = state | 1;
    std::memcpy(&bytes[i], &word, std::min<size_t>(8, length - i));
  }
  return bytes;
}

std::vector<std::byte> loose_pattern(size_t length, uint64_t seed) {
  std::vector<std::byte> bytes = pattern(length, seed);
  for (size_t i = 0; i < length; ++i)
    if (i % 64 >= 16) bytes[i] = bytes[i - 16];
  return bytes;
}

}  // namespace imgfuse::test
