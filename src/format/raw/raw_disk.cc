#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>

#include "base/buffer.h"
#include "base/latch.h"
#include "base/mutex.h"
#include "core/host_space.h"
#include "core/range_lock.h"
#include "format/magic.h"
#include "format/raw/raw.h"

namespace imgfuse::raw {
namespace {

constexpr uint32_t kClusterSize = 4096;
/// Longest range that one lease keeps others out of.
constexpr uint64_t kLongestStep = uint64_t{256} << 20;

HostOffset host(GuestOffset offset) { return HostOffset(offset.bytes()); }
HostRange host(GuestRange range) { return {host(range.begin), range.length}; }

/// Guest offset = host offset. Writes share a range, as the guest orders overlapping ones itself; zeroing and
/// allocation have it alone, because they look at what the host holds before they change it. Reads take no lease.
class RawDisk final : public Disk {
 public:
  RawDisk(std::shared_ptr<Storage> storage, OpenParameters parameters, uint64_t size)
      : name_(storage->info().name),
        read_only_(parameters.read_only),
        probed_(parameters.probed),
        storage_(std::move(storage)),
        size_(size) {}
  ~RawDisk() override { assert(read_only_ || !storage_); }
  int share_host_file() override;

 private:
  DiskInfo do_info() const override {
    return {.name = name_, .format = "raw", .size = size_, .cluster_size = kClusterSize, .read_only = read_only_};
  }
  uint64_t do_size() const override { return size_; }
  Result<> do_read(GuestOffset offset, Bytes out) override { return storage_->read(host(offset), out); }
  Result<> do_write(GuestOffset offset, ConstBytes data) override;
  Result<> do_write_zeroes(GuestRange range, Zeroing zeroing) override;
  Result<> do_populate(GuestRange range, Holes holes) override;
  Result<std::vector<Extent>> do_map(GuestRange range, size_t max_extents) override;
  Result<> do_flush() override;
  Result<> do_resize(uint64_t size, ResizeOptions options) override;
  Result<> do_close() override;
  uint64_t do_allocated() const override { return storage_->allocated().value_or(0); }
  Result<> do_count_allocated(const std::atomic<bool>&) override { return {}; }

  bool guards(GuestOffset offset) const { return probed_ && offset.bytes() < kMagicBytes; }
  Result<> check_first_sector(GuestOffset offset, ConstBytes data) REQUIRES(first_sector_);
  Result<> write_guarded(GuestOffset offset, ConstBytes data);

  const std::string name_;
  const bool read_only_;
  const bool probed_;
  std::shared_ptr<Storage> storage_;  // until closed
  std::atomic<uint64_t> size_;

  Latch latch_;
  RangeLock ranges_;
  // Held by guarded writes across their I/O, so that two halves of a magic number cannot meet.
  Mutex first_sector_{LockRank::tables};
};

/// A probed raw disk must not turn into another format: the next open would see that, with a guest's choice of
/// backing files.
Result<> RawDisk::check_first_sector(GuestOffset offset, ConstBytes data) {
  std::array<std::byte, kMagicBytes> sector;
  IMG_TRY(storage_->read(HostOffset(0), sector));
  const size_t begin = offset.bytes();
  std::copy_n(data.begin(), std::min(data.size(), sector.size() - begin),
              sector.begin() + static_cast<ptrdiff_t>(begin));
  if (const auto format = magic_format(sector))
    return fail(ErrorCode::denied,
                "the write would make {} look like a {} image, and its format was guessed; open it with --format raw",
                name_, *format);
  return {};
}

Result<> RawDisk::write_guarded(GuestOffset offset, ConstBytes data) {
  Lock lock(first_sector_);
  IMG_TRY(check_first_sector(offset, data));
  return storage_->write(host(offset), data);
}

Result<> RawDisk::do_write(GuestOffset offset, ConstBytes data) {
  if (read_only_) return fail(ErrorCode::read_only, "{} is open read-only", name_);
  IMG_TRY(latch_.check());
  const auto lease = ranges_.shared({offset, data.size()});
  return guards(offset) ? write_guarded(offset, data) : storage_->write(host(offset), data);
}

Result<> RawDisk::do_write_zeroes(GuestRange range, Zeroing zeroing) {
  // The first sector's zeros are written like data: a zero is the last byte of some magic numbers.
  if (guards(range.begin)) {
    const uint64_t length = std::min(range.length, kMagicBytes - range.begin.bytes());
    IMG_TRY(do_write(range.begin, zeroes(length)));
  }
  while (!range.empty()) {
    IMG_TRY(latch_.check());
    const GuestRange step{range.begin, std::min(range.length, kLongestStep)};
    const auto lease = ranges_.exclusive(step);
    IMG_TRY(zeroing == Zeroing::may_free ? zero_and_free(*storage_, host(step)) : storage_->write_zeroes(host(step)));
    range = {step.end(), range.length - step.length};
  }
  return {};
}

Result<> RawDisk::do_populate(GuestRange range, Holes holes) {
  if (holes == Holes::keep) return {};  // there is nothing below
  while (!range.empty()) {
    IMG_TRY(latch_.check());
    const GuestRange step{range.begin, std::min(range.length, kLongestStep)};
    const auto lease = ranges_.exclusive(step);
    IMG_TRY(storage_->allocate(host(step)));
    range = {step.end(), range.length - step.length};
  }
  return {};
}

/// A hole of the host file is `zero`, not `hole`: this layer decides that it reads as zeros, and it has an offset. This
/// is what qemu-img says too: present, zero, no data, with an offset.
Result<std::vector<Extent>> RawDisk::do_map(GuestRange range, size_t max_extents) {
  std::vector<Extent> extents;
  while (!range.empty()) {
    IMG_LET(const StorageExtent piece, storage_->extent(host(range)));
    const ExtentKind kind = piece.data ? ExtentKind::data : ExtentKind::zero;
    if (!extents.empty() && extents.back().kind == kind) {
      extents.back().range.length += piece.length;
    } else {
      if (extents.size() == max_extents) break;
      extents.push_back({.range = {range.begin, piece.length},
                         .kind = kind,
                         .allocated = piece.data,
                         .has_host_offset = true,
                         .host = host(range.begin)});
    }
    range = {range.begin + piece.length, range.length - piece.length};
  }
  return extents;
}

/// Not where writes have to be looked at.
int RawDisk::share_host_file() {
  if ((probed_ && !read_only_) || storage_->size() != size_) return -1;
  return storage_->share_file();
}

Result<> RawDisk::do_flush() {
  IMG_TRY(latch_.check());
  auto result = storage_->flush();
  if (!result) latch_.set(result.error());
  return result;
}

Result<> RawDisk::do_resize(uint64_t size, ResizeOptions options) {
  IMG_TRY(latch_.check());
  IMG_TRY(raw::resize(*storage_, size_, size, options.preallocation));
  size_ = size;
  return {};
}

Result<> RawDisk::do_close() {
  auto result = read_only_ ? Result<>{} : do_flush();
  storage_.reset();
  return result;
}

}  // namespace

Result<std::unique_ptr<Disk>> open(std::shared_ptr<Storage> storage, OpenParameters parameters) {
  IMG_LET(const uint64_t size, storage->size());
  return std::make_unique<RawDisk>(std::move(storage), parameters, size);
}

}  // namespace imgfuse::raw
