// Random numbers of tests: one seed, printed on failure and settable from outside.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "imgfuse/storage.h"

namespace imgfuse::test {

class Rng {
 public:
  explicit Rng(uint64_t seed) : engine_(seed) {}

  uint64_t next() { return engine_(); }
  /// In [0, n).
  uint64_t below(uint64_t n) { return engine_() % n; }
  /// In [low, high].
  uint64_t between(uint64_t low, uint64_t high) { return low + below(high - low + 1); }
  bool one_in(uint64_t n) { return below(n) == 0; }

 private:
  std::mt19937_64 engine_;
};

/// IMG_SEED, or a fixed number: a run without it is repeatable.
uint64_t base_seed();
/// A number from the environment, such as IMG_RUNS, or `fallback`.
uint64_t from_environment(const char* name, uint64_t fallback);

/// Bytes that look random and depend on `seed`; never a whole sector of zeros.
std::vector<std::byte> pattern(size_t length, uint64_t seed = 1);
/// As pattern(), but three quarters of each 64 bytes repeat the others: it can be compressed.
std::vector<std::byte> loose_pattern(size_t length, uint64_t seed = 1);

}  // namespace imgfuse::test
