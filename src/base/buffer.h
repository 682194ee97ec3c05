// Memory for I/O, aligned so that O_DIRECT accepts it.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

#include "imgfuse/storage.h"

namespace imgfuse {

inline constexpr size_t kBufferAlignment = 4096;

/// A fixed piece of aligned memory. Not cleared unless asked for.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t size) : size_(size) {
    if (size == 0) return;
    const size_t rounded = (size + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
    data_.reset(static_cast<std::byte*>(std::aligned_alloc(kBufferAlignment, rounded)));
    if (!data_) std::abort();
  }
  static Buffer zeroed(size_t size);

  std::byte* data() { return data_.get(); }
  const std::byte* data() const { return data_.get(); }
  size_t size() const { return size_; }
  Bytes bytes() { return {data(), size_}; }
  ConstBytes bytes() const { return {data(), size_}; }
  /// Makes it at least this large; the content is lost when it grows.
  void reserve(size_t size) {
    if (size_ < size) *this = Buffer(size);
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte[], Free> data_;
  size_t size_ = 0;
};

/// Scratch memory of the calling thread, `size` bytes; the next call's.
Bytes scratch(size_t size);

/// A read-only stretch of zeros, at most kZeroesSize long. Longer fills repeat it.
inline constexpr size_t kZeroesSize = size_t{2} << 20;
ConstBytes zeroes(size_t length);
bool is_zero(ConstBytes bytes);

}  // namespace imgfuse
