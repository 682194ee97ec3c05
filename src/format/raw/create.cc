#include <cassert>

#include "core/host_space.h"
#include "format/raw/raw.h"

namespace imgfuse::raw {
namespace {

Result<> check_preallocation(Preallocation preallocation) {
  if (preallocation == Preallocation::metadata)
    return fail(ErrorCode::invalid, "a raw image has no metadata to preallocate; off, falloc and full are possible");
  return {};
}

}  // namespace

Result<> check_create_options(const CreateOptions& options) {
  if (options.backing_file || options.backing_format)
    return fail(ErrorCode::invalid, "a raw image has no backing file; qcow2 and QED can have one");
  if (options.data_file || options.data_file_raw)
    return fail(ErrorCode::invalid, "a raw image has no data file beside it; qcow2 can have one");
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
  return preallocate(storage, {HostOffset(old_size), size - old_size}, preallocation);
}

Result<ImageInfo> info(Storage& storage) {
  ImageInfo info;
  info.format = "raw";
  IMG_LET(info.virtual_size, storage.size());
  return info;
}

}  // namespace imgfuse::raw
