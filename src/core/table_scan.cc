#include "core/table_scan.h"

#include <algorithm>

#include "base/buffer.h"

namespace imgfuse {
namespace {

constexpr uint64_t kLongestEntry = 16;
constexpr uint64_t kPieceBytes = uint64_t{256} << 10;

/// The data at the front of `range`, at most one piece of it; or a hole that is skipped.
Result<StorageExtent> front_of(Storage& storage, HostRange range) {
  IMG_LET(StorageExtent extent, storage.extent(range));
  extent.length = std::min(extent.length, range.length);
  // Holes begin and end between entries, as hosts have them in blocks. Should one not, read all.
  if (extent.length < range.length && extent.length % kLongestEntry != 0) extent.length = 0;
  if (extent.length == 0) extent = {range.length, true};
  if (extent.data) extent.length = std::min(extent.length, kPieceBytes);
  return extent;
}

}  // namespace

Result<> edit_table_bytes(Storage& storage, HostRange range, TableHoles holes,
                          const std::function<Result<bool>(uint64_t first, Bytes piece)>& visit) {
  for (uint64_t done = 0; done < range.length;) {
    const HostRange rest{range.begin + done, range.length - done};
    StorageExtent extent{std::min(rest.length, kPieceBytes), true};
    if (holes == TableHoles::skipped) {
      IMG_LET(extent, front_of(storage, rest));
    }
    if (extent.data) {
      Buffer buffer(extent.length);
      IMG_TRY(storage.read(rest.begin, buffer.bytes()));
      IMG_LET(const bool changed, visit(done / 8, buffer.bytes()));
      if (changed) IMG_TRY(storage.write(rest.begin, buffer.bytes()));
    }
    done += extent.length;
  }
  return {};
}

}  // namespace imgfuse
