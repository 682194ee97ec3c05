#include "support/mem_storage.h"

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/buffer.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace imgfuse::test {
namespace {

/// Calls `f(page index, offset in page, offset in range, length)` for each page that the range touches.
template <class F>
void for_each_page(uint64_t offset, uint64_t length, F f) {
  for (uint64_t done = 0; done < length;) {
    const uint64_t in_page = (offset + done) % MemImage::kPageSize;
    const uint64_t n = std::min<uint64_t>(MemImage::kPageSize - in_page, length - done);
    f((offset + done) / MemImage::kPageSize, in_page, done, n);
    done += n;
  }
}

void require(bool ok, const char* what, const std::string& path) {
  if (ok) return;
  std::fprintf(stderr, "%s %s: %s\n", what, path.c_str(), std::strerror(errno));
  std::abort();
}

}  // namespace

void MemImage::read(uint64_t offset, Bytes out) const {
  for_each_page(offset, out.size(), [&](uint64_t page, uint64_t in_page, uint64_t done, uint64_t n) {
    const auto found = pages_.find(page);
    if (found == pages_.end()) {
      std::memset(out.data() + done, 0, n);
    } else {
      std::memcpy(out.data() + done, found->second->data() + in_page, n);
    }
  });
}

MemImage::Page& MemImage::own_page(uint64_t index) {
  std::shared_ptr<Page>& page = pages_[index];
  if (!page) {
    page = std::make_shared<Page>();  // zeros
  } else {
    // Counting it once more, unlike looking at the count, comes after what other threads did with copies that are gone.
    const std::shared_ptr<Page> held = page;
    if (held.use_count() > 2) page = std::make_shared<Page>(*held);
  }
  return *page;
}

void MemImage::write(uint64_t offset, ConstBytes data) {
  for_each_page(offset, data.size(), [&](uint64_t page, uint64_t in_page, uint64_t done, uint64_t n) {
    if (!pages_.contains(page) && is_zero(data.subspan(done, n))) return;  // keeps images of large clusters small
    std::memcpy(own_page(page).data() + in_page, data.data() + done, n);
  });
  size_ = std::max(size_, offset + data.size());
}

void MemImage::zero(uint64_t offset, uint64_t length) {
  if (offset >= size_) return;
  const uint64_t end = offset + std::min(length, size_ - offset);
  // Only pages that are there are touched: the range may be terabytes.
  for (auto it = pages_.lower_bound(offset / kPageSize); it != pages_.end() && it->first * kPageSize < end;) {
    const uint64_t page_begin = it->first * kPageSize;
    const uint64_t from = std::max(offset, page_begin);
    const uint64_t to = std::min(end, page_begin + kPageSize);
    if (to - from == kPageSize) {
      it = pages_.erase(it);
    } else {
      std::memset(own_page(it->first).data() + (from - page_begin), 0, to - from);
      ++it;
    }
  }
}

void MemImage::resize(uint64_t size) {
  if (size < size_) zero(size, size_ - size);
  size_ = size;
}

StorageExtent MemImage::extent(uint64_t offset, uint64_t length) const {
  const uint64_t first = offset / kPageSize;
  auto it = pages_.lower_bound(first);
  uint64_t end = first;  // in pages
  const bool data = it != pages_.end() && it->first == first;
  if (data) {
    const auto is_enough = [&] { return end > first && end * kPageSize - offset >= length; };
    for (; it != pages_.end() && it->first == end && !is_enough(); ++it) ++end;
  } else if (it == pages_.end()) {
    return {length, false};
  } else {
    end = it->first;
  }
  return {std::min(length, end * kPageSize - offset), data};
}

MemImage MemImage::load(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  require(fd >= 0, "open", path);
  MemImage image;
  struct stat st = {};
  require(::fstat(fd, &st) == 0, "stat", path);
  const auto size = static_cast<uint64_t>(st.st_size);
  Buffer buffer(size_t{1} << 20);
  for (uint64_t offset = 0; offset < size;) {
    const off_t data = ::lseek(fd, static_cast<off_t>(offset), SEEK_DATA);
    if (data < 0) break;  // a hole up to the end
    offset = static_cast<uint64_t>(data);
    const ssize_t n = ::pread(fd, buffer.data(), buffer.size(), data);
    require(n > 0, "read", path);
    image.write(offset, buffer.bytes().first(static_cast<size_t>(n)));
    offset += static_cast<uint64_t>(n);
  }
  image.resize(size);
  ::close(fd);
  return image;
}

void MemImage::save(const std::string& path) const {
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  require(fd >= 0, "create", path);
  for (const auto& [index, page] : pages_)
    require(::pwrite(fd, page->data(), kPageSize, static_cast<off_t>(index * kPageSize)) == ssize_t{kPageSize}, "write",
            path);
  require(::ftruncate(fd, static_cast<off_t>(size_)) == 0, "resize", path);
  ::close(fd);
}

MemStorage::MemStorage(MemImage image, bool writable)
    : info_{.name = "memory", .writable = writable, .extensible = true}, image_(std::move(image)) {}

MemImage MemStorage::image() const {
  SharedLock lock(mutex_);
  return image_;
}

Result<uint64_t> MemStorage::size() {
  SharedLock lock(mutex_);
  return image_.size();
}

Result<> MemStorage::read(HostOffset offset, Bytes out) {
  assert(HeldRanks::may_block());
  ++counts_.reads;
  counts_.bytes_read += out.size();
  SharedLock lock(mutex_);
  image_.read(offset.bytes(), out);
  return {};
}

Result<> MemStorage::write(HostOffset offset, std::span<const ConstBytes> parts) {
  assert(HeldRanks::may_block());
  ++counts_.writes;
  ExclusiveLock lock(mutex_);
  for (const ConstBytes part : parts) {
    image_.write(offset.bytes(), part);
    offset = offset + part.size();
    counts_.bytes_written += part.size();
  }
  return {};
}

Result<> MemStorage::write_zeroes(HostRange range) {
  assert(HeldRanks::may_block());
  ++counts_.zeroes;
  ExclusiveLock lock(mutex_);
  if (range.end().bytes() > image_.size()) image_.resize(range.end().bytes());
  image_.zero(range.begin.bytes(), range.length);
  return {};
}

Result<> MemStorage::discard(HostRange range) {
  assert(HeldRanks::may_block());
  ++counts_.discards;
  ExclusiveLock lock(mutex_);
  image_.zero(range.begin.bytes(), range.length);
  return {};
}

Result<> MemStorage::allocate(HostRange range) {
  ExclusiveLock lock(mutex_);
  if (range.end().bytes() > image_.size()) image_.resize(range.end().bytes());
  return {};
}

Result<> MemStorage::flush() {
  assert(HeldRanks::may_block());
  ++counts_.flushes;
  return {};
}

Result<> MemStorage::resize(uint64_t size) {
  ExclusiveLock lock(mutex_);
  image_.resize(size);
  return {};
}

Result<StorageExtent> MemStorage::extent(HostRange range) {
  SharedLock lock(mutex_);
  return image_.extent(range.begin.bytes(), range.length);
}

Result<uint64_t> MemStorage::allocated() {
  SharedLock lock(mutex_);
  return image_.allocated();
}

}  // namespace imgfuse::test
