#include "core/host_space.h"

#include <algorithm>

#include "base/buffer.h"

namespace imgfuse {
namespace {

Result<> write_every_byte(Storage& storage, HostRange range) {
  while (!range.empty()) {
    const ConstBytes piece = zeroes(std::min<uint64_t>(range.length, kZeroesSize));
    IMG_TRY(storage.write(range.begin, piece));
    range = {range.begin + piece.size(), range.length - piece.size()};
  }
  return {};
}

}  // namespace

Result<> preallocate(Storage& storage, HostRange range, Preallocation mode) {
  if (range.empty()) return {};
  if (mode == Preallocation::falloc) return storage.allocate(range);
  if (mode == Preallocation::full) return write_every_byte(storage, range);
  return {};
}

Result<> zero_and_free(Storage& storage, HostRange range) {
  IMG_TRY(storage.discard(range));
  while (!range.empty()) {
    IMG_LET(const StorageExtent piece, storage.extent(range));
    if (piece.data) IMG_TRY(storage.write_zeroes({range.begin, piece.length}));
    range = {range.begin + piece.length, range.length - piece.length};
  }
  return {};
}

}  // namespace imgfuse
