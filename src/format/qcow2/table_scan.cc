#include "format/qcow2/table_scan.h"

#include <algorithm>
#include <utility>

#include "base/buffer.h"

namespace imgfuse::qcow2 {
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

Result<> edit_piece(Storage& storage, HostRange piece, uint64_t first,
                    const std::function<Result<bool>(uint64_t first, Entries)>& visit) {
  Buffer buffer(piece.length);
  IMG_TRY(storage.read(piece.begin, buffer.bytes()));
  IMG_LET(const bool changed, visit(first, Entries(reinterpret_cast<be<uint64_t>*>(buffer.data()), piece.length / 8)));
  if (changed) IMG_TRY(storage.write(piece.begin, buffer.bytes()));
  return {};
}

}  // namespace

Result<> edit_table(Storage& storage, HostRange range,
                    const std::function<Result<bool>(uint64_t first, Entries)>& visit) {
  uint64_t done = 0;
  while (done < range.length) {
    const HostRange rest{range.begin + done, range.length - done};
    IMG_LET(const StorageExtent extent, front_of(storage, rest));
    if (extent.data) {
      IMG_TRY(edit_piece(storage, {rest.begin, extent.length}, done / 8, visit));
    }
    done += extent.length;
  }
  return {};
}

Result<> edit_whole_table(Storage& storage, HostRange range,
                          const std::function<Result<bool>(uint64_t first, Entries)>& visit) {
  for (uint64_t done = 0; done < range.length; done += kPieceBytes)
    IMG_TRY(edit_piece(storage, {range.begin + done, std::min(range.length - done, kPieceBytes)}, done / 8, visit));
  return {};
}

Result<> scan_table(Storage& storage, HostRange range, const std::function<Result<>(uint64_t first, Entries)>& visit) {
  return edit_table(storage, range, [&](uint64_t first, Entries entries) -> Result<bool> {
    IMG_TRY(visit(first, entries));
    return false;
  });
}

std::vector<Stretch> overlay(const std::vector<HostRange>& tables) {
  std::vector<std::pair<HostOffset, int>> borders;  // +1 where a table begins, -1 where it ends
  for (const HostRange& table : tables) {
    if (table.empty()) continue;
    borders.emplace_back(table.begin, 1);
    borders.emplace_back(table.end(), -1);
  }
  std::sort(borders.begin(), borders.end());
  std::vector<Stretch> stretches;
  uint64_t times = 0;
  for (size_t i = 0; i < borders.size(); ++i) {
    const auto& [position, step] = borders[i];
    times += static_cast<uint64_t>(step);
    if (times == 0) continue;
    const HostRange range{position, borders[i + 1].first - position};
    if (!range.empty()) stretches.push_back({range, times});
  }
  return stretches;
}

}  // namespace imgfuse::qcow2
