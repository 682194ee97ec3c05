// The common part of storages that stand between a driver and another storage.
#pragma once

#include <memory>

#include "imgfuse/storage.h"

namespace imgfuse::test {

enum class Call : unsigned {
  read = 1,
  write = 2,
  zero = 4,
  discard = 8,
  allocate = 16,
  flush = 32,
  resize = 64,
  query = 128,  ///< size, extent, allocated
};
constexpr unsigned operator|(Call a, Call b) { return static_cast<unsigned>(a) | static_cast<unsigned>(b); }
constexpr unsigned operator|(unsigned a, Call b) { return a | static_cast<unsigned>(b); }

/// Which calls are meant.
struct CallSet {
  unsigned bits = ~0u;
  constexpr CallSet() = default;
  constexpr CallSet(Call call) : bits(static_cast<unsigned>(call)) {}  // NOLINT(google-explicit-constructor)
  constexpr CallSet(unsigned calls) : bits(calls) {}                   // NOLINT(google-explicit-constructor)
  constexpr bool contains(Call call) const { return (bits & static_cast<unsigned>(call)) != 0; }
};

/// Passes every call on, with before() and after() around it. Thread-safe as far as the hooks are.
class InterceptedStorage : public Storage {
 public:
  explicit InterceptedStorage(std::shared_ptr<Storage> inner) : inner_(std::move(inner)) {}

  Storage& inner() { return *inner_; }

  const StorageInfo& info() const override { return inner_->info(); }
  Result<uint64_t> size() override {
    return around<uint64_t>(Call::query, {}, [&] { return inner_->size(); });
  }
  Result<> read(HostOffset offset, Bytes out) override {
    return around<void>(Call::read, {offset, out.size()}, [&] { return inner_->read(offset, out); });
  }
  using Storage::write;
  Result<> write(HostOffset offset, std::span<const ConstBytes> parts) override {
    return around<void>(Call::write, {offset, length_of(parts)}, [&] { return inner_->write(offset, parts); });
  }
  Result<> write_zeroes(HostRange range) override {
    return around<void>(Call::zero, range, [&] { return inner_->write_zeroes(range); });
  }
  Result<> discard(HostRange range) override {
    return around<void>(Call::discard, range, [&] { return inner_->discard(range); });
  }
  Result<> allocate(HostRange range) override {
    return around<void>(Call::allocate, range, [&] { return inner_->allocate(range); });
  }
  Result<> flush() override {
    return around<void>(Call::flush, {}, [&] { return inner_->flush(); });
  }
  Result<> resize(uint64_t size) override {
    return around<void>(Call::resize, {HostOffset(size), 0}, [&] { return inner_->resize(size); });
  }
  Result<StorageExtent> extent(HostRange range) override {
    return around<StorageExtent>(Call::query, range, [&] { return inner_->extent(range); });
  }
  Result<uint64_t> allocated() override {
    return around<uint64_t>(Call::query, {}, [&] { return inner_->allocated(); });
  }

  static uint64_t length_of(std::span<const ConstBytes> parts) {
    uint64_t length = 0;
    for (const ConstBytes part : parts) length += part.size();
    return length;
  }

 protected:
  /// An error is returned instead of making the call.
  virtual Result<> before(Call, HostRange) { return {}; }
  /// Only after calls that succeeded.
  virtual void after(Call, HostRange) {}

 private:
  template <class T, class F>
  Result<T> around(Call call, HostRange range, F f) {
    IMG_TRY(before(call, range));
    Result<T> result = f();
    if (result) after(call, range);
    return result;
  }

  std::shared_ptr<Storage> inner_;
};

}  // namespace imgfuse::test
