// A host file that is one piece of memory, for fuzzing: fast, and with an end to its growth.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "imgfuse/storage.h"

namespace imgfuse::fuzz {

class ByteStorage final : public Storage {
 public:
  static constexpr uint64_t kMaxSize = uint64_t{64} << 20;

  explicit ByteStorage(ConstBytes content) : bytes_(content.begin(), content.end()) {}

  const StorageInfo& info() const override { return info_; }
  Result<uint64_t> size() override { return bytes_.size(); }

  Result<> read(HostOffset offset, Bytes out) override {
    const uint64_t begin = std::min<uint64_t>(offset.bytes(), bytes_.size());
    const size_t n = std::min<size_t>(out.size(), bytes_.size() - begin);
    if (n > 0) std::memcpy(out.data(), bytes_.data() + begin, n);
    std::fill(out.begin() + static_cast<ptrdiff_t>(n), out.end(), std::byte{0});
    return {};
  }
  using Storage::write;
  Result<> write(HostOffset offset, std::span<const ConstBytes> parts) override {
    for (const ConstBytes part : parts) {
      IMG_TRY(grow({offset, part.size()}));
      std::copy(part.begin(), part.end(), bytes_.begin() + static_cast<ptrdiff_t>(offset.bytes()));
      offset = offset + part.size();
    }
    return {};
  }
  Result<> write_zeroes(HostRange range) override {
    IMG_TRY(grow(range));
    std::fill_n(bytes_.begin() + static_cast<ptrdiff_t>(range.begin.bytes()), range.length, std::byte{0});
    return {};
  }
  Result<> discard(HostRange) override { return {}; }
  Result<> allocate(HostRange range) override { return grow(range); }
  Result<> flush() override { return {}; }
  Result<> resize(uint64_t size) override {
    if (size > kMaxSize) return fail(ErrorCode::no_space, "the storage ends at {} bytes", kMaxSize);
    bytes_.resize(size);
    return {};
  }
  Result<StorageExtent> extent(HostRange range) override {
    if (range.begin.bytes() >= bytes_.size()) return StorageExtent{range.length, false};
    return StorageExtent{std::min<uint64_t>(range.length, bytes_.size() - range.begin.bytes()), true};
  }
  Result<uint64_t> allocated() override { return bytes_.size(); }

 private:
  Result<> grow(HostRange range) {
    if (range.begin.bytes() > kMaxSize || range.length > kMaxSize - range.begin.bytes())
      return fail(ErrorCode::no_space, "the storage ends at {} bytes", kMaxSize);
    bytes_.resize(std::max<uint64_t>(bytes_.size(), range.end().bytes()));
    return {};
  }

  const StorageInfo info_{.name = "fuzz", .writable = true, .extensible = true};
  std::vector<std::byte> bytes_;
};

}  // namespace imgfuse::fuzz
