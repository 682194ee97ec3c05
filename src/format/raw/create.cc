#include <algorithm>
#include <cassert>
#include <limits>

#include "base/buffer.h"
#include "format/raw/raw.h"

namespace imgfuse::raw {
namespace {

Result<> write_every_byte(Storage& storage, uint64_t size) {
  for (uint64_t offset = 0; offset < size;) {
    const ConstBytes piece = zeroes(std::min<uint64_t>(size - offset, kZeroesSize));
    IMG_TRY(storage.write(HostOffset(offset), piece));
    offset += piece.size();
  }
  return {};
}

}  // namespace

Result<> check_create_options(const CreateOptions& options) {
  if (options.backing_file || options.backing_format)
    return fail(ErrorCode::invalid, "a raw image has no backing file; qcow2 can have one");
  if (options.preallocation == Preallocation::metadata)
    return fail(ErrorCode::invalid, "a raw image has no metadata to preallocate; off, falloc and full are possible");
  if (!options.size) return fail(ErrorCode::invalid, "a raw image needs a size");
  return {};
}

Result<> create(Storage& storage, const CreateOptions& options) {
  assert(options.size);
  const HostRange whole{HostOffset(0), *options.size};
  IMG_TRY(storage.resize(whole.length));
  if (options.preallocation == Preallocation::falloc) return storage.allocate(whole);
  if (options.preallocation == Preallocation::full) return write_every_byte(storage, whole.length);
  return {};
}

Result<ImageInfo> info(Storage& storage) {
  ImageInfo info;
  info.format = "raw";
  IMG_LET(info.virtual_size, storage.size());
  return info;
}

}  // namespace imgfuse::raw
