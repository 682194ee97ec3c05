#include "format/qcow2/data_file.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/log.h"

namespace imgfuse::qcow2 {

Result<std::shared_ptr<DataFile>> DataFile::open(std::shared_ptr<Storage> file, uint64_t disk_size) {
  IMG_LET(const uint64_t size, file->size());
  const StorageInfo& info = file->info();
  if (size < disk_size && !info.extensible)
    return fail(ErrorCode::invalid, "data file {} has {} bytes, the disk has {}", info.name, size, disk_size);
  if (size < disk_size)
    log_warning("data file {} has {} bytes, the disk has {}: what is missing reads as zeros", info.name, size,
                disk_size);
  return std::shared_ptr<DataFile>(new DataFile(std::move(file), disk_size));
}

/// How many bytes at the front of the range are the disk's.
uint64_t DataFile::in_disk(HostRange range) const {
  const uint64_t end = end_.load();
  return range.begin.bytes() >= end ? 0 : std::min(range.length, end - range.begin.bytes());
}

Result<> DataFile::read(HostOffset offset, Bytes out) {
  const uint64_t there = in_disk({offset, out.size()});
  if (there < out.size()) std::memset(out.data() + there, 0, out.size() - there);
  return there == 0 ? Result<>{} : file_->read(offset, out.first(there));
}

Result<> DataFile::write(HostOffset offset, std::span<const ConstBytes> parts) {
  uint64_t length = 0;
  for (const ConstBytes part : parts) length += part.size();
  uint64_t left = in_disk({offset, length});
  if (left == length) return file_->write(offset, parts);
  std::vector<ConstBytes> inside;
  for (const ConstBytes part : parts) {
    inside.push_back(part.first(std::min<uint64_t>(part.size(), left)));
    left -= inside.back().size();
  }
  return file_->write(offset, inside);
}

Result<> DataFile::write_zeroes(HostRange range) {
  range.length = in_disk(range);
  return range.empty() ? Result<>{} : file_->write_zeroes(range);
}

Result<> DataFile::discard(HostRange range) {
  range.length = in_disk(range);
  return range.empty() ? Result<>{} : file_->discard(range);
}

Result<> DataFile::allocate(HostRange range) {
  range.length = in_disk(range);
  return range.empty() ? Result<>{} : file_->allocate(range);
}

Result<StorageExtent> DataFile::extent(HostRange range) {
  const uint64_t there = in_disk(range);
  return there == 0 ? StorageExtent{range.length, false} : file_->extent({range.begin, there});
}

Result<> DataFile::resize(uint64_t size) {
  IMG_LET(const uint64_t length, file_->size());
  const uint64_t end = end_.load();
  const bool extensible = file_->info().extensible;
  if (size > length && !extensible)
    return fail(ErrorCode::no_space, "data file {} has {} bytes, {} are needed", file_->info().name, length, size);
  // A file may go on behind the disk's end, with bytes that were never the guest's.
  if (const uint64_t old = std::min(size, length); old > end)
    IMG_TRY(file_->write_zeroes({HostOffset(end), old - end}));
  if (extensible && size != length) IMG_TRY(file_->resize(size));
  end_ = size;
  return {};
}

}  // namespace imgfuse::qcow2
