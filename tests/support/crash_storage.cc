#include "support/crash_storage.h"

#include <algorithm>

#include "base/math.h"

namespace imgfuse::test {

CrashStorage::CrashStorage(MemImage durable) : durable_(durable), current_(std::move(durable)) {}

void CrashStorage::apply(const Change& change, MemImage& image) {
  const uint64_t end = std::max(image.size(), change.grows_to);
  switch (change.kind) {
    case Change::Kind::write:
      image.write(change.offset, change.data);
      break;
    case Change::Kind::zero:
      image.zero(change.offset, change.length);
      break;
    case Change::Kind::resize:
      return image.resize(change.length);
  }
  image.resize(end);  // whole sectors must not make the file longer than it was made
}

/// Lets a random set of sectors through: the front, the back, or any.
void CrashStorage::apply_torn(const Change& change, MemImage& image, Rng& rng) {
  const uint64_t sectors = divide_up(change.kind == Change::Kind::resize ? 0 : change.length, kSector);
  if (sectors <= 1) return apply(change, image);
  const uint64_t cut = rng.between(1, sectors - 1);
  const uint64_t way = rng.below(3);
  const uint64_t end = std::max(image.size(), change.grows_to);
  for (uint64_t i = 0; i < sectors; ++i) {
    const bool through = way == 0 ? i < cut : way == 1 ? i >= cut : rng.one_in(2);
    if (!through) continue;
    Change sector{change.kind, change.offset + i * kSector, std::min(kSector, change.length - i * kSector), 0, {}};
    if (change.kind == Change::Kind::write) {
      const auto begin = change.data.begin() + static_cast<ptrdiff_t>(i * kSector);
      sector.data.assign(begin, begin + static_cast<ptrdiff_t>(sector.length));
    }
    sector.grows_to = std::min(end, sector.offset + sector.length);
    apply(sector, image);
  }
}

size_t CrashStorage::pending() const {
  Lock lock(mutex_);
  return pending_.size();
}

MemImage CrashStorage::image() const {
  Lock lock(mutex_);
  return current_;
}

MemImage CrashStorage::crash(uint64_t chosen) const {
  Lock lock(mutex_);
  MemImage image = durable_;
  for (size_t i = 0; i < pending_.size(); ++i)
    if (chosen >> i & 1) apply(*pending_[i], image);
  return image;
}

MemImage CrashStorage::crash(CrashMode mode, Rng& rng) const {
  Lock lock(mutex_);
  MemImage image = durable_;
  const size_t n = pending_.size();
  if (n == 0) return image;
  const size_t missing = rng.below(n);
  for (size_t i = 0; i < n; ++i) {
    const Change& change = *pending_[i];
    switch (mode) {
      case CrashMode::none:
        break;
      case CrashMode::all:
        apply(change, image);
        break;
      case CrashMode::newest:
        if (i == n - 1) apply(change, image);
        break;
      case CrashMode::one_missing:
        if (i != missing) apply(change, image);
        break;
      case CrashMode::random:
        if (rng.one_in(2)) apply(change, image);
        break;
      case CrashMode::torn:
        if (!rng.one_in(3)) apply_torn(change, image, rng);
        break;
    }
  }
  return image;
}

Result<> CrashStorage::add(Change change) {
  apply(change, current_);
  pending_.push_back(std::make_shared<const Change>(std::move(change)));
  return {};
}

CrashStorage::Change CrashStorage::whole_sectors(uint64_t offset, const std::vector<std::byte>& data) const {
  Change change{Change::Kind::write, round_down(offset, kSector), 0, offset + data.size(), {}};
  change.length = round_up(change.grows_to, kSector) - change.offset;
  change.data.resize(change.length);
  current_.read(change.offset, change.data);
  std::copy(data.begin(), data.end(), change.data.begin() + static_cast<ptrdiff_t>(offset - change.offset));
  return change;
}

void CrashStorage::observe() const {
  if (observer_) observer_();
}

Result<> CrashStorage::write(HostOffset offset, std::span<const ConstBytes> parts) {
  {
    Lock lock(mutex_);
    std::vector<std::byte> data;
    for (const ConstBytes part : parts) data.insert(data.end(), part.begin(), part.end());
    IMG_TRY(add(whole_sectors(offset.bytes(), data)));
  }
  observe();
  return {};
}

Result<> CrashStorage::write_zeroes(HostRange range) {
  {
    Lock lock(mutex_);
    if (range.begin.bytes() % kSector == 0 && range.length % kSector == 0) {
      IMG_TRY(add({Change::Kind::zero, range.begin.bytes(), range.length, range.end().bytes(), {}}));
    } else {
      IMG_TRY(add(whole_sectors(range.begin.bytes(), std::vector<std::byte>(range.length))));
    }
  }
  observe();
  return {};
}

Result<> CrashStorage::discard(HostRange range) {
  {
    Lock lock(mutex_);
    range.length = std::min(range.end().bytes(), current_.size()) - std::min(range.begin.bytes(), current_.size());
    if (range.begin.bytes() % kSector == 0 && range.length % kSector == 0) {
      IMG_TRY(add({Change::Kind::zero, range.begin.bytes(), range.length, 0, {}}));
    } else {  // the host zeroes parts of its blocks as it writes them
      IMG_TRY(add(whole_sectors(range.begin.bytes(), std::vector<std::byte>(range.length))));
    }
  }
  observe();
  return {};
}

Result<> CrashStorage::allocate(HostRange range) {
  {
    Lock lock(mutex_);
    if (range.end().bytes() <= current_.size()) return {};
    IMG_TRY(add({Change::Kind::resize, 0, range.end().bytes(), 0, {}}));
  }
  observe();
  return {};
}

Result<> CrashStorage::resize(uint64_t size) {
  {
    Lock lock(mutex_);
    IMG_TRY(add({Change::Kind::resize, 0, size, 0, {}}));
  }
  observe();
  return {};
}

Result<> CrashStorage::flush() {
  {
    Lock lock(mutex_);
    for (const auto& change : pending_) apply(*change, durable_);
    pending_.clear();
  }
  observe();
  return {};
}

Result<uint64_t> CrashStorage::size() {
  Lock lock(mutex_);
  return current_.size();
}

Result<> CrashStorage::read(HostOffset offset, Bytes out) {
  Lock lock(mutex_);
  current_.read(offset.bytes(), out);
  return {};
}

Result<StorageExtent> CrashStorage::extent(HostRange range) {
  Lock lock(mutex_);
  return current_.extent(range.begin.bytes(), range.length);
}

Result<uint64_t> CrashStorage::allocated() {
  Lock lock(mutex_);
  return current_.allocated();
}

}  // namespace imgfuse::test
