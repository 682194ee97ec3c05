#include "format/qcow2/bitmap_directory.h"

#include <algorithm>
#include <cstring>

#include "base/math.h"
#include "format/qcow2/byte_reader.h"
#include "format/qcow2/layout.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint32_t kMaxBitmaps = 65535;
constexpr uint64_t kMaxDirectoryBytes = uint64_t{65535} << 10;
constexpr uint32_t kMaxTableEntries = uint32_t{1} << 27;

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
  if (entries > kMaxTableEntries)
    return fail(ErrorCode::corrupt, "bitmap {}: table of {} entries has more than {}", index, entries,
                kMaxTableEntries);
  return HostRange{HostOffset(offset), uint64_t{entries} * 8};
}

}  // namespace

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
  if (bytes > kMaxDirectoryBytes)
    return fail(ErrorCode::corrupt, "bitmap directory of {} bytes is longer than {}", bytes, kMaxDirectoryBytes);
  if (offset == 0 || offset % header.cluster_size() != 0 || offset >> 63)
    return fail(ErrorCode::corrupt, "bitmap directory offset {:#x} is not a multiple of the cluster size {}", offset,
                header.cluster_size());

  BitmapDirectory directory{{HostOffset(offset), bytes}, {}};
  ByteReader reader(storage, directory.range.begin);
  uint64_t used = 0;
  for (uint32_t index = 0; index < count; ++index) {
    IMG_LET(const auto entry, reader.read<wire::BitmapHeader>());
    const uint64_t rest = uint64_t{entry.extra_size} + entry.name_length;
    used += round_up(sizeof entry + rest, 8);
    if (used > bytes)
      return fail(ErrorCode::corrupt, "bitmap {} of {} lies past the directory's end ({} bytes)", index, count, bytes);
    reader.skip(round_up(sizeof entry + rest, 8) - sizeof entry);
    IMG_LET(const HostRange table, table_of(header, index, entry));
    directory.tables.push_back(table);
  }
  return directory;
}

}  // namespace imgfuse::qcow2
