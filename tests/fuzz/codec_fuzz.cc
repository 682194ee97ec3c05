// Any bytes as compressed data.
#include <cstdlib>
#include <vector>

#include "core/codec.h"

using namespace imgfuse;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const ConstBytes in(reinterpret_cast<const std::byte*>(data), size);
  for (const size_t length : {512u, 4096u, 65536u}) {
    std::vector<std::byte> out(length);
    (void)codec::inflate(in, out);
    (void)codec::unzstd(in, out);
  }
  return 0;
}
