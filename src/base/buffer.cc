#include "base/buffer.h"

#include <sys/mman.h>

#include <cassert>
#include <cstring>

namespace imgfuse {

Buffer Buffer::zeroed(size_t size) {
  Buffer buffer(size);
  if (size) std::memset(buffer.data(), 0, size);
  return buffer;
}

Bytes scratch(size_t size) {
  thread_local Buffer buffer;
  buffer.reserve(size);
  return buffer.bytes().first(size);
}

ConstBytes zeroes(size_t length) {
  assert(length <= kZeroesSize);
  // Never written, so all its pages are the host's one zero page.
  static const auto* const page = [] {
    void* p = mmap(nullptr, kZeroesSize, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) std::abort();
    return static_cast<const std::byte*>(p);
  }();
  return {page, length};
}

bool is_zero(ConstBytes bytes) {
  if (bytes.empty()) return true;
  return bytes[0] == std::byte{0} && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0;
}

}  // namespace imgfuse
