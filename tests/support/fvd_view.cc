#include "support/fvd_view.h"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <set>

namespace imgfuse::test {

uint64_t FvdView::number(uint64_t offset, int bytes) const {
  std::array<std::byte, 8> raw{};
  image_.read(offset, Bytes(raw).first(static_cast<size_t>(bytes)));
  uint64_t value = 0;
  for (int i = bytes; i-- > 0;) value = value << 8 | std::to_integer<uint64_t>(raw[static_cast<size_t>(i)]);
  return value;
}

std::optional<FvdView> FvdView::parse(const MemImage& image) {
  FvdView view(image);
  if (view.number(0, 4) != 0x5143F5A9 || view.number(4, 4) != 1) return std::nullopt;
  view.all_data = view.number(8, 4) != 0;
  view.virtual_size = view.number(12, 8);
  view.metadata_size = view.number(20, 8);
  view.base_size = view.number(1068, 8);
  const uint64_t bitmap = view.number(1076, 8);
  view.block_size = view.number(1092, 4);
  view.separate_data_ = view.number(1108, 1) != 0;
  view.compact = view.number(2208, 4) != 0;
  const uint64_t table = view.number(2212, 8);
  view.chunk_size = view.number(2220, 8);
  const uint64_t journal = view.number(4284, 8), journal_size = view.number(4292, 8);
  view.clean = view.number(4300, 4) != 0;
  if (!view.all_data) {
    view.base_size = std::min(view.base_size, view.virtual_size);
    const uint64_t blocks = (view.base_size + view.block_size - 1) / view.block_size;
    std::vector<std::byte> bits((blocks + 7) / 8);
    image.read(bitmap, bits);
    for (uint64_t b = 0; b < blocks; ++b)
      view.in_image.push_back((std::to_integer<unsigned>(bits[b / 8]) >> (b % 8) & 1) != 0);
  }
  if (view.compact) {
    const uint64_t entries = (view.virtual_size + view.chunk_size - 1) / view.chunk_size;
    for (uint64_t i = 0; i < entries; ++i) {
      const uint64_t entry = view.number(table + i * 4, 4);
      view.table.push_back(static_cast<uint32_t>(entry == 0xFFFFFFFF ? entry : entry & 0x7FFFFFFF));
    }
  }
  if (!view.clean && (view.compact || !view.all_data)) view.replay(journal, journal_size / 512);
  return view;
}

void FvdView::replay(uint64_t offset, uint64_t sectors) {
  for (uint64_t sector = 0; sector < sectors; ++sector) {
    const uint64_t start = offset + sector * 512;
    uint64_t at = 0;
    while (at + 4 <= 512) {
      const uint64_t type = number(start + at, 4);
      if (type == 0x3F2AB8ED) {
        if (at + 16 > 512) journal_error_ = fmt::format("journal sector {}: a bitmap record is cut off", sector);
        const uint64_t count = number(start + at + 4, 4), first = number(start + at + 8, 8);
        if ((first + count) * 512 > virtual_size)
          journal_error_ = fmt::format("journal sector {}: sectors {}+{} are past the disk", sector, first, count);
        for (uint64_t s = first; s < first + count && !all_data && s * 512 < base_size; ++s)
          in_image[s * 512 / block_size] = true;
        ++bitmap_records;
        at += 16;
        break;
      }
      if (type != 0xB4E6F7AC) break;
      const uint64_t first = number(start + at + 4, 4), count = number(start + at + 8, 4);
      if (at + 12 + count * 4 > 512 || first + count > table.size()) {
        journal_error_ = fmt::format("journal sector {}: entries {}+{} do not fit", sector, first, count);
        break;
      }
      for (uint64_t i = 0; i < count; ++i) {
        const uint64_t entry = number(start + at + 12 + i * 4, 4);
        if (entry == 0xFFFFFFFF) journal_error_ = fmt::format("journal sector {}: an empty entry", sector);
        table[first + i] = static_cast<uint32_t>(entry & 0x7FFFFFFF);
      }
      ++table_records;
      at += 12 + count * 4;
    }
    for (; at > 0 && at < 512; at += 4)  // what memory held before shall not get into an image
      if (number(start + at, 4) != 0) journal_error_ = fmt::format("journal sector {}: bytes behind its end", sector);
    if (at > 0 || number(start, 4) != 0) ++used_journal_sectors;
  }
}

MemImage FvdView::content(const std::vector<GuestRange>& parts, const MemImage& base, const MemImage* data) const {
  MemImage content;
  content.resize(virtual_size);
  const MemImage& from = separate_data_ && data != nullptr ? *data : image_;
  const uint64_t start = separate_data_ ? 0 : metadata_size / 512 * 512;
  std::array<std::byte, 512> sector;
  for (const GuestRange& part : parts) {
    for (uint64_t at = part.begin.bytes(); at < std::min(part.end().bytes(), virtual_size); at += 512) {
      if (!all_data && at < base_size && !in_image[at / block_size]) {
        base.read(at, sector);
      } else if (!compact) {
        from.read(start + at, sector);
      } else if (table[at / chunk_size] == 0xFFFFFFFF) {
        continue;
      } else {
        from.read(start + table[at / chunk_size] * chunk_size + at % chunk_size, sector);
      }
      if (std::any_of(sector.begin(), sector.end(), [](std::byte b) { return b != std::byte{0}; }))
        content.write(at, sector);
    }
  }
  return content;
}

std::string FvdView::find_corruption() const {
  if (!journal_error_.empty()) return journal_error_;
  std::set<uint32_t> seen;
  for (const uint32_t entry : table) {
    if (entry == 0xFFFFFFFF) continue;
    if (!seen.insert(entry).second) return fmt::format("two entries claim chunk {}", entry);
    if (!separate_data_ && metadata_size / 512 * 512 + (entry + uint64_t{1}) * chunk_size > image_.size())
      return fmt::format("chunk {} is not inside the file of {} bytes", entry, image_.size());
  }
  return {};
}

}  // namespace imgfuse::test
