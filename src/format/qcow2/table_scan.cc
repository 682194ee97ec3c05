#include "format/qcow2/table_scan.h"

#include <algorithm>
#include <utility>

namespace imgfuse::qcow2 {

Result<> edit_table(Storage& storage, HostRange range,
                    const std::function<Result<bool>(uint64_t first, Entries)>& visit) {
  return imgfuse::edit_table<std::endian::big>(storage, range, TableHoles::skipped, visit);
}

Result<> edit_whole_table(Storage& storage, HostRange range,
                          const std::function<Result<bool>(uint64_t first, Entries)>& visit) {
  return imgfuse::edit_table<std::endian::big>(storage, range, TableHoles::shown, visit);
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
