#include <algorithm>
#include <cassert>
#include <limits>

#include "base/buffer.h"
#include "format/raw/raw.h"

namespace imgfuse::raw {
namespace {

Result<> write_every_byte(Storage& storage, HostRange range) {
  for (uint64_t done = 0; done < range.length;) {
    const ConstBytes piece = zeroes(std::min<uint64_t>(range.length - done, kZeroesSize));
    IMG_TRY(storage.write(range.begin + done, piece));
    done += piece.size();
  }
  return {};
}

Result<> check_preallocation(Preallocation preallocation) {
  if (preallocation == Preallocation::metadata)
    return fail(ErrorCode::invalid, "a raw image has no metadata to preallocate; off, falloc and full are possible");
  return {};
}

}  // namespace

Result<> check_create_options(const CreateOptions& options) {
  if (options.backing_file || options.backing_format)
    return fail(ErrorCode::invalid, "a raw image has no backing file; qcow2 can have one");
  IMG_TRY(check_preallocation(options.preallocation));
  if (!options.size) return fail(ErrorCode::invalid, "a raw image needs a size");
  return {};
}

Result<> create(Storage& storage, const CreateOptions& options) {
  assert(options.size);
  return resize(storage, 0, *options.size, options.preallocation);
}

Result<> resize(Storage& storage, uint64_t old_size, uint64_t size, Preallocation preallocation) {
  IMG_TRY(check_preallocation(preallocation));
  IMG_TRY(storage.resize(size));
  if (size <= old_size) return {};
  const HostRange added{HostOffset(old_size), size - old_size};
  if (preallocation == Preallocation::falloc) return storage.allocate(added);
  if (preallocation == Preallocation::full) return write_every_byte(storage, added);
  return {};
}

Result<ImageInfo> info(Storage& storage) {
  ImageInfo info;
  info.format = "raw";
  IMG_LET(info.virtual_size, storage.size());
  return info;
}

}  // namespace imgfuse::raw
