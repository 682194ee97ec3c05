#include "core/disk_storage.h"

#include <algorithm>
#include <cstring>

#include "base/log.h"
#include "base/math.h"

namespace imgfuse {
namespace {

constexpr uint64_t kSector = 512;

StorageInfo describe(const DiskInfo& disk) {
  return {.name = disk.name, .writable = !disk.read_only, .extensible = !disk.read_only};
}

}  // namespace

DiskStorage::DiskStorage(std::unique_ptr<Disk> disk) : disk_(std::move(disk)), info_(describe(disk_->info())) {}

DiskStorage::~DiskStorage() {
  // Whoever needed its content to be durable has flushed it.
  if (const Result<> closed = disk_->close(); !closed) log_warning("{}: {}", info_.name, closed.error().text());
}

GuestRange DiskStorage::inside(HostRange range) const {
  const uint64_t begin = range.begin.bytes();
  const uint64_t end = std::min(range.end().bytes(), disk_->size());
  return {GuestOffset(begin), end > begin ? end - begin : 0};
}

Result<> DiskStorage::read(HostOffset offset, Bytes out) {
  const uint64_t there = inside({offset, out.size()}).length;
  if (there < out.size()) std::memset(out.data() + there, 0, out.size() - there);
  return there == 0 ? Result<>{} : disk_->read(GuestOffset(offset.bytes()), out.first(there));
}

Result<> DiskStorage::write(HostOffset offset, std::span<const ConstBytes> parts) {
  uint64_t end = offset.bytes();
  for (const ConstBytes part : parts) end += part.size();
  IMG_TRY(grow_to(end));
  GuestOffset at(offset.bytes());
  for (const ConstBytes part : parts) {
    IMG_TRY(disk_->write(at, part));
    at = at + part.size();
  }
  return {};
}

Result<> DiskStorage::write_zeroes(HostRange range) {
  IMG_TRY(grow_to(range.end().bytes()));
  return disk_->write_zeroes(inside(range), Zeroing::keep_allocation);
}

Result<> DiskStorage::discard(HostRange range) { return disk_->write_zeroes(inside(range), Zeroing::may_free); }

Result<> DiskStorage::allocate(HostRange range) {
  IMG_TRY(grow_to(range.end().bytes()));
  return disk_->populate(inside(range));
}

Result<> DiskStorage::grow_to(uint64_t size) {
  if (size <= disk_->size()) return {};
  const auto lease = growth_.exclusive({GuestOffset(0), 1});
  return size <= disk_->size() ? Result<>{} : disk_->resize(round_up(size, kSector));
}

Result<> DiskStorage::resize(uint64_t size) {
  const auto lease = growth_.exclusive({GuestOffset(0), 1});
  return disk_->resize(round_up(size, kSector), {.shrink = true});
}

Result<StorageExtent> DiskStorage::extent(HostRange range) {
  const GuestRange there = inside(range);
  if (there.empty()) return StorageExtent{range.length, false};
  IMG_LET(const std::vector<Extent> extents, disk_->map(there));
  StorageExtent found{0, extents.front().kind == ExtentKind::data};
  for (const Extent& extent : extents) {
    if ((extent.kind == ExtentKind::data) != found.data) return found;
    found.length += extent.range.length;
  }
  if (!found.data && found.length == there.length) found.length = range.length;  // and what lies past the end
  return found;
}

}  // namespace imgfuse
