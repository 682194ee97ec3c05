// Reads a host object front to back, a few bytes at a time.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

#include "base/buffer.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"
#include "imgfuse/units.h"

namespace imgfuse::qcow2 {

/// One thread. Reads ahead in pieces, so that small reads cost little.
class ByteReader {
 public:
  ByteReader(Storage& storage, HostOffset begin) : storage_(storage), next_(begin) {}

  Result<> read(Bytes out) {
    while (!out.empty()) {
      if (rest_.empty()) IMG_TRY(fill());
      const size_t n = std::min(out.size(), rest_.size());
      std::memcpy(out.data(), rest_.data(), n);
      out = out.subspan(n);
      rest_ = rest_.subspan(n);
    }
    return {};
  }

  template <class T>
  Result<T> read() {
    static_assert(std::is_trivially_copyable_v<T>);
    T value;
    IMG_TRY(read(std::as_writable_bytes(std::span(&value, 1))));
    return value;
  }

  Result<std::string> read_text(size_t length) {
    std::string text(length, '\0');
    IMG_TRY(read(std::as_writable_bytes(std::span(text))));
    return text;
  }

  void skip(uint64_t length) {
    const uint64_t n = std::min<uint64_t>(length, rest_.size());
    rest_ = rest_.subspan(n);
    next_ = next_ + (length - n);
  }

 private:
  Result<> fill() {
    IMG_TRY(storage_.read(next_, piece_.bytes()));
    next_ = next_ + piece_.size();
    rest_ = piece_.bytes();
    return {};
  }

  Storage& storage_;
  HostOffset next_;  // of the first byte behind piece_
  Buffer piece_{size_t{64} << 10};
  ConstBytes rest_;  // of piece_, not yet read
};

}  // namespace imgfuse::qcow2
