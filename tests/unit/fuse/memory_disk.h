// A disk in memory, with units of 4 KiB that are a hole, zero or data.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "base/mutex.h"
#include "imgfuse/disk.h"

namespace imgfuse::fuse {

class MemoryDisk : public Disk {
 public:
  static constexpr uint64_t kUnit = 4096;

  explicit MemoryDisk(uint64_t size, bool read_only = false) : read_only_(read_only) { set_size(size); }

  /// What the next writes, flushes and the close return.
  void fail_with(std::optional<Error> error) EXCLUDES(mutex_) {
    const Lock lock(mutex_);
    error_ = std::move(error);
  }
  int flushes() const { return flushes_; }
  bool closed() const { return closed_; }
  std::vector<std::byte> content() {
    const Lock lock(mutex_);
    return content_;
  }

 private:
  void set_size(uint64_t size) {
    const Lock lock(mutex_);
    content_.resize(size);
    units_.resize((size + kUnit - 1) / kUnit, ExtentKind::hole);
    size_ = size;
  }
  Result<> status() const REQUIRES(mutex_) { return error_ ? Result<>(fail(*error_)) : Result<>(); }
  void mark(GuestRange range, ExtentKind kind) REQUIRES(mutex_) {
    for (uint64_t unit = range.begin.bytes() / kUnit; unit * kUnit < range.end().bytes(); ++unit) units_[unit] = kind;
  }

  DiskInfo do_info() const override { return {"memory", "memory", size_, kUnit, read_only_}; }
  uint64_t do_size() const override { return size_; }
  Result<> do_read(GuestOffset offset, Bytes out) override {
    const Lock lock(mutex_);
    std::memcpy(out.data(), content_.data() + offset.bytes(), out.size());
    return {};
  }
  Result<> do_write(GuestOffset offset, ConstBytes data) override {
    const Lock lock(mutex_);
    IMG_TRY(status());
    std::memcpy(content_.data() + offset.bytes(), data.data(), data.size());
    mark({offset, data.size()}, ExtentKind::data);
    return {};
  }
  Result<> do_write_zeroes(GuestRange range, Zeroing zeroing) override {
    const Lock lock(mutex_);
    IMG_TRY(status());
    std::memset(content_.data() + range.begin.bytes(), 0, range.length);
    if (range.begin.bytes() % kUnit == 0 && range.length % kUnit == 0)
      mark(range, zeroing == Zeroing::may_free ? ExtentKind::hole : ExtentKind::zero);
    return {};
  }
  Result<> do_populate(GuestRange range, Holes) override {
    const Lock lock(mutex_);
    IMG_TRY(status());
    mark(range, ExtentKind::data);
    return {};
  }
  Result<std::vector<Extent>> do_map(GuestRange range, size_t max_extents) override {
    const Lock lock(mutex_);
    std::vector<Extent> extents;
    for (GuestOffset at = range.begin; at < range.end() && extents.size() < max_extents;) {
      const GuestOffset next(std::min((at.bytes() / kUnit + 1) * kUnit, range.end().bytes()));
      const ExtentKind kind = units_[at.bytes() / kUnit];
      if (!extents.empty() && extents.back().kind == kind)
        extents.back().range.length += next - at;
      else
        extents.push_back({{at, next - at}, kind});
      at = next;
    }
    return extents;
  }
  Result<> do_flush() override {
    ++flushes_;
    const Lock lock(mutex_);
    return status();
  }
  Result<> do_resize(uint64_t size, ResizeOptions) override {
    set_size(size);
    return {};
  }
  Result<> do_close() override {
    closed_ = true;
    const Lock lock(mutex_);
    return status();
  }
  uint64_t do_allocated() const override {
    const Lock lock(mutex_);
    return static_cast<uint64_t>(std::count(units_.begin(), units_.end(), ExtentKind::data)) * kUnit;
  }
  Result<> do_count_allocated(const std::atomic<bool>&) override { return {}; }

  const bool read_only_;
  std::atomic<uint64_t> size_ = 0;
  std::atomic<int> flushes_ = 0;
  std::atomic<bool> closed_ = false;
  mutable Mutex mutex_;
  std::vector<std::byte> content_ GUARDED_BY(mutex_);
  std::vector<ExtentKind> units_ GUARDED_BY(mutex_);
  std::optional<Error> error_ GUARDED_BY(mutex_);
};

}  // namespace imgfuse::fuse
