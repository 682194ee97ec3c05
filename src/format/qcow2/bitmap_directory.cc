#include "format/qcow2/bitmap_directory.h"

#include <algorithm>
#include <cstring>

#include "base/math.h"
#include "format/qcow2/byte_reader.h"
#include "format/qcow2/layout.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint32_t kKnownFlags = kBitmapInUse | kBitmapAuto | kBitmapExtraCompatible;

const Extension* find_extension(const Header& header, uint32_t type) {
  const auto at = std::find_if(header.extensions.begin(), header.extensions.end(),
                               [&](const Extension& extension) { return extension.type == type; });
  return at == header.extensions.end() ? nullptr : &*at;
}

Result<HostRange> table_of(const Header& header, uint32_t index, const wire::BitmapHeader& raw) {
  const uint64_t offset = raw.table_offset;
  const uint32_t entries = raw.table_entries;
  if (offset == 0 || offset % header.cluster_size() != 0 || offset >> 63)
    return fail(ErrorCode::corrupt, "bitmap {}: table offset {:#x} is not a multiple of the cluster size {}", index,
                offset, header.cluster_size());
  if (entries > kMaxBitmapTableEntries)
    return fail(ErrorCode::corrupt, "bitmap {}: table of {} entries has more than {}", index, entries,
                kMaxBitmapTableEntries);
  return HostRange{HostOffset(offset), uint64_t{entries} * 8};
}

void append(std::vector<std::byte>& out, ConstBytes bytes) { out.insert(out.end(), bytes.begin(), bytes.end()); }

}  // namespace

uint64_t BitmapEntry::stored_bytes() const {
  return round_up(sizeof(wire::BitmapHeader) + extra.size() + name.size(), 8);
}

Result<std::optional<BitmapDirectory>> read_bitmap_directory(Storage& storage, const Header& header) {
  const Extension* extension = find_extension(header, wire::kExtensionBitmaps);
  if ((header.autoclear & kBitmaps) == 0 || extension == nullptr) return std::nullopt;
  wire::BitmapsExtension raw;
  std::memcpy(&raw, extension->data.data(), sizeof raw);  // the header was refused if it had another length
  const uint32_t count = raw.count;
  const uint64_t offset = raw.directory_offset;
  const uint64_t bytes = raw.directory_bytes;
  if (count == 0 || count > kMaxBitmaps)
    return fail(ErrorCode::corrupt, "{} bitmaps are not between 1 and {}", count, kMaxBitmaps);
  if (bytes > kMaxBitmapDirectoryBytes)
    return fail(ErrorCode::corrupt, "bitmap directory of {} bytes is longer than {}", bytes, kMaxBitmapDirectoryBytes);
  if (offset == 0 || offset % header.cluster_size() != 0 || offset >> 63)
    return fail(ErrorCode::corrupt, "bitmap directory offset {:#x} is not a multiple of the cluster size {}", offset,
                header.cluster_size());

  BitmapDirectory directory{{HostOffset(offset), bytes}, {}, {}};
  ByteReader reader(storage, directory.range.begin);
  uint64_t used = 0;
  for (uint32_t index = 0; index < count; ++index) {
    IMG_LET(const auto entry, reader.read<wire::BitmapHeader>());
    const uint64_t rest = uint64_t{entry.extra_size} + entry.name_length;
    used += round_up(sizeof entry + rest, 8);
    if (used > bytes)
      return fail(ErrorCode::corrupt, "bitmap {} of {} lies past the directory's end ({} bytes)", index, count, bytes);
    BitmapEntry bitmap;
    IMG_LET(bitmap.table, table_of(header, index, entry));
    bitmap.flags = entry.flags;
    bitmap.type = entry.type;
    bitmap.granularity_bits = entry.granularity_bits;
    bitmap.extra.resize(entry.extra_size);
    IMG_TRY(reader.read(bitmap.extra));
    IMG_LET(bitmap.name, reader.read_text(entry.name_length));
    reader.skip(round_up(sizeof entry + rest, 8) - sizeof entry - rest);
    directory.tables.push_back(bitmap.table);
    directory.bitmaps.push_back(std::move(bitmap));
  }
  return directory;
}

Result<> check_bitmap(const Header& header, const BitmapEntry& bitmap) {
  if (bitmap.flags & kBitmapInUse) return fail(ErrorCode::corrupt, "a writer has not stored it");
  if (bitmap.flags & ~kKnownFlags) return fail(ErrorCode::unsupported, "it has unknown flags, {:#x}", bitmap.flags);
  if (bitmap.type != kDirtyTracking) return fail(ErrorCode::unsupported, "it is of the unknown type {}", bitmap.type);
  if (!bitmap.extra.empty() && (bitmap.flags & kBitmapExtraCompatible) == 0)
    return fail(ErrorCode::unsupported, "it has {} bytes of extra data that must be understood", bitmap.extra.size());
  if (bitmap.granularity_bits < kMinGranularityBits || bitmap.granularity_bits > kMaxGranularityBits)
    return fail(ErrorCode::corrupt, "its granularity of 2^{} bytes is not between 2^{} and 2^{}",
                bitmap.granularity_bits, kMinGranularityBits, kMaxGranularityBits);
  const uint64_t needed = bitmap_table_entries(header.size, bitmap.granularity_bits, header.cluster_size());
  if (bitmap.table.length != needed * 8)
    return fail(ErrorCode::corrupt, "its table has {} entries, a disk of {} bytes needs {}", bitmap.table.length / 8,
                header.size, needed);
  if (needed > kMaxBitmapBytes / header.cluster_size())
    return fail(ErrorCode::corrupt, "it has {} clusters of bits, more than {} bytes", needed, kMaxBitmapBytes);
  return {};
}

std::vector<std::byte> encode_bitmap_directory(const std::vector<BitmapEntry>& bitmaps) {
  std::vector<std::byte> out;
  for (const BitmapEntry& bitmap : bitmaps) {
    wire::BitmapHeader raw;
    raw.table_offset = bitmap.table.begin.bytes();
    raw.table_entries = static_cast<uint32_t>(bitmap.table.length / 8);
    raw.flags = bitmap.flags;
    raw.type = bitmap.type;
    raw.granularity_bits = bitmap.granularity_bits;
    raw.name_length = static_cast<uint16_t>(bitmap.name.size());
    raw.extra_size = static_cast<uint32_t>(bitmap.extra.size());
    append(out, std::as_bytes(std::span(&raw, 1)));
    append(out, bitmap.extra);
    append(out, std::as_bytes(std::span(bitmap.name)));
    out.resize(round_up(out.size(), 8));
  }
  return out;
}

Extension bitmaps_extension(size_t count, HostRange directory) {
  wire::BitmapsExtension raw;
  raw.count = static_cast<uint32_t>(count);
  raw.directory_bytes = directory.length;
  raw.directory_offset = directory.begin.bytes();
  const auto bytes = std::as_bytes(std::span(&raw, 1));
  return {wire::kExtensionBitmaps, {bytes.begin(), bytes.end()}};
}

uint64_t bitmap_table_entries(uint64_t size, unsigned granularity_bits, uint64_t cluster_size) {
  const uint64_t bits = divide_up(size, uint64_t{1} << granularity_bits);
  return divide_up(divide_up(bits, 8), cluster_size);
}

}  // namespace imgfuse::qcow2
