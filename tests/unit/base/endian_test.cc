#include "base/endian.h"

#include <doctest/doctest.h>

#include <cstring>

using namespace imgfuse;

TEST_CASE("endian: big-endian fields lie most significant byte first, at any alignment") {
  struct {
    char pad;
    be<uint32_t> value;
  } field{0, 0x514649fbu};

  CHECK(sizeof field == 5);
  CHECK(std::memcmp(&field.value, "QFI\xfb", 4) == 0);
  CHECK(field.value == 0x514649fbu);
}
