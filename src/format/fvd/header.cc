#include "format/fvd/header.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <string_view>
#include <vector>

namespace imgfuse::fvd {
namespace {

constexpr uint64_t kMaxSize = uint64_t{1} << 62;

Result<std::string> text_of(const char* field, size_t room, const char* name) {
  const char* const end = std::find(field, field + room, '\0');
  if (end == field + room) return fail(ErrorCode::corrupt, "the {} has no end within its {} bytes", name, room);
  return std::string(field, end);
}

Result<uint64_t> size_of(uint64_t value, uint64_t unit, const char* name) {
  if (value >= kMaxSize) return fail(ErrorCode::corrupt, "{} {:#x} is out of range", name, value);
  if (value % unit != 0) return fail(ErrorCode::corrupt, "{} {} is not a multiple of {}", name, value, unit);
  return value;
}

struct Region {
  std::string_view name;
  uint64_t begin;
  uint64_t length;  // in use
};

std::vector<Region> regions_of(const Header& header) {
  std::vector<Region> regions = {{"header", 0, kHeaderBytes}};
  if (header.uses_base()) regions.push_back({"bitmap", header.bitmap_offset, header.bitmap_bytes()});
  if (header.compact) regions.push_back({"table", header.table_offset, header.table_bytes()});
  if (header.journal_sectors() > 0)
    regions.push_back({"journal", header.journal_offset, header.journal_sectors() * kSector});
  std::erase_if(regions, [](const Region& region) { return region.length == 0; });
  std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
  return regions;
}

Result<> check_regions(const Header& header, uint64_t file_size) {
  const std::vector<Region> regions = regions_of(header);
  for (size_t i = 0; i < regions.size(); ++i) {
    const auto& [name, begin, length] = regions[i];
    const std::optional<uint64_t> end = checked_add(begin, length);
    if (!end || *end > header.metadata_size)
      return fail(ErrorCode::corrupt, "the {} at {:#x}+{:#x} is not inside the metadata, which end at {:#x}", name,
                  begin, length, header.metadata_size);
    if (*end > file_size)
      return fail(ErrorCode::corrupt, "the {} at {:#x}+{:#x} lies past the end of the file ({:#x})", name, begin,
                  length, file_size);
    if (i + 1 < regions.size() && *end > regions[i + 1].begin)
      return fail(ErrorCode::corrupt, "the {} at {:#x}+{:#x} overlaps the {} at {:#x}", name, begin, length,
                  regions[i + 1].name, regions[i + 1].begin);
  }
  return {};
}

Result<> read_base(const wire::Header& wire, Header& header) {
  header.all_data_in_image = wire.all_data_in_image != 0;
  IMG_LET(header.base_name, text_of(wire.base_name, sizeof wire.base_name, "base image's name"));
  IMG_LET(header.base_format, text_of(wire.base_format, sizeof wire.base_format, "base image's format"));
  header.base_size = wire.base_size;
  header.block_size = wire.block_size;
  header.bitmap_offset = wire.bitmap_offset;
  header.bitmap_size = wire.bitmap_size;
  if (!header.uses_base()) return {};
  if (header.base_name.empty())
    return fail(ErrorCode::corrupt, "the image says that a base image is in use, but names none");
  IMG_TRY(size_of(wire.base_size, kSector, "the base image's size"));
  if (header.block_size == 0 || header.block_size % kSector != 0 || header.block_size >> 31)
    return fail(ErrorCode::corrupt, "block size {} is not a multiple of 512", header.block_size);
  IMG_TRY(size_of(wire.bitmap_size, 1, "the bitmap's size"));
  if (header.bitmap_bytes() > header.bitmap_size)
    return fail(ErrorCode::corrupt, "the bitmap has {} bytes, and {} blocks need {}", header.bitmap_size,
                header.blocks(), header.bitmap_bytes());
  if (header.bitmap_bytes() > kMaxTable)
    return fail(ErrorCode::unsupported, "the bitmap's {} bytes are more than {}", header.bitmap_bytes(), kMaxTable);
  return {};
}

Result<> read_compact(const wire::Header& wire, Header& header) {
  header.compact = wire.compact != 0;
  if (!header.compact) return {};
  header.table_offset = wire.table_offset;
  IMG_LET(header.chunk_size, size_of(wire.chunk_size, kPage, "chunk size"));
  if (header.chunk_size == 0) return fail(ErrorCode::corrupt, "chunk size 0 is not a multiple of 4096");
  IMG_LET(header.storage_grow_unit, size_of(wire.storage_grow_unit, 1, "storage_grow_unit"));
  IMG_LET(header.add_storage_command,
          text_of(wire.add_storage_command, sizeof wire.add_storage_command, "add_storage_cmd"));
  if (header.chunks() > uint64_t{kMaxChunk} + 1)
    return fail(ErrorCode::corrupt, "{} chunks are more than a table can tell apart", header.chunks());
  if (header.table_bytes() > kMaxTable)
    return fail(ErrorCode::unsupported, "the table's {} bytes are more than {}", header.table_bytes(), kMaxTable);
  return {};
}

void read_prefetch(const wire::Header& wire, CopySettings& settings) {
  settings.copy_on_read = wire.copy_on_read != 0;
  settings.max_outstanding_copy_on_read = wire.max_outstanding_copy_on_read;
  settings.start_delay = static_cast<int32_t>(uint32_t{wire.prefetch_start_delay});
  settings.slots = wire.prefetch_slots;
  settings.bytes_per_prefetch = wire.bytes_per_prefetch;
  settings.read_measure_time = wire.read_measure_time;
  settings.write_measure_time = wire.write_measure_time;
  settings.average_alpha = wire.average_alpha;
  settings.min_read_throughput = wire.min_read_throughput;
  settings.min_write_throughput = wire.min_write_throughput;
  settings.throttle_time = static_cast<int32_t>(uint32_t{wire.throttle_time});
}

Result<Header> decode(const wire::Header& wire) {
  Header header;
  IMG_LET(header.virtual_size, size_of(wire.virtual_size, kSector, "virtual disk size"));
  IMG_LET(header.metadata_size, size_of(wire.metadata_size, 1, "metadata size"));
  IMG_TRY(read_base(wire, header));
  IMG_LET(header.data_name, text_of(wire.data_name, sizeof wire.data_name, "data file's name"));
  IMG_LET(header.data_format, text_of(wire.data_format, sizeof wire.data_format, "data file's format"));
  IMG_TRY(read_compact(wire, header));
  header.journal_offset = wire.journal_offset;
  IMG_LET(header.journal_size, size_of(wire.journal_size, 1, "journal size"));
  header.clean_shutdown = wire.clean_shutdown != 0;
  header.need_zero_init = wire.need_zero_init != 0;
  read_prefetch(wire, header.copying);
  return header;
}

void put(std::string_view text, char* field) { std::copy(text.begin(), text.end(), field); }

}  // namespace

uint64_t Header::table_room() const {
  uint64_t end = metadata_size;
  for (const Region& region : regions_of(*this))
    if (region.begin > table_offset) end = std::min(end, region.begin);
  return end - table_offset;
}

Result<Header> read_header(Storage& storage) {
  IMG_LET(const uint64_t file_size, storage.size());
  wire::Header wire;
  IMG_TRY(storage.read(HostOffset(0), std::as_writable_bytes(std::span(&wire, 1))));
  if (std::memcmp(&wire, "FVD", 4) == 0)
    return fail(ErrorCode::unsupported,
                "it has the magic of a later FVD draft, of which no program is known; FVD version 1 is supported");
  if (wire.magic != kMagic)
    return fail(ErrorCode::corrupt, "magic {:#010x} is not that of FVD, {:#010x}", uint32_t{wire.magic}, kMagic);
  if (wire.version != kVersion)
    return fail(ErrorCode::unsupported, "FVD version {} is not supported; 1 is", uint32_t{wire.version});
  if (file_size < kHeaderBytes)
    return fail(ErrorCode::corrupt, "the file has {} bytes and ends inside the header, which has {}", file_size,
                kHeaderBytes);
  auto header = decode(wire);
  if (header)
    if (auto sound = check_regions(*header, file_size); !sound) header = fail(sound.error());
  if (!header && header.error().code() == ErrorCode::corrupt)
    return fail(ErrorCode::corrupt, "{} (damage, or the layout of another FVD version, such as that of February 2011)",
                header.error().text());
  return header;
}

wire::Header encode(const Header& header) {
  wire::Header wire;
  std::memset(static_cast<void*>(&wire), 0, sizeof wire);
  wire.magic = kMagic;
  wire.version = kVersion;
  wire.all_data_in_image = header.all_data_in_image ? 1 : 0;
  wire.virtual_size = header.virtual_size;
  wire.metadata_size = header.metadata_size;
  if (header.uses_base()) {
    const CopySettings& p = header.copying;
    put(header.base_name, wire.base_name);
    put(header.base_format, wire.base_format);
    wire.base_size = header.base_size;
    wire.bitmap_offset = header.bitmap_offset;
    wire.bitmap_size = header.bitmap_size;
    wire.block_size = header.block_size;
    wire.copy_on_read = p.copy_on_read ? 1 : 0;
    wire.max_outstanding_copy_on_read = p.max_outstanding_copy_on_read;
    wire.prefetch_start_delay = static_cast<uint32_t>(p.start_delay);
    wire.prefetch_slots = p.slots;
    wire.bytes_per_prefetch = p.bytes_per_prefetch;
    wire.read_measure_time = p.read_measure_time;
    wire.write_measure_time = p.write_measure_time;
    wire.average_alpha = p.average_alpha;
    wire.min_read_throughput = p.min_read_throughput;
    wire.min_write_throughput = p.min_write_throughput;
    wire.max_read_throughput = 1000000000;
    wire.max_write_throughput = 1000000000;
    wire.throttle_time = static_cast<uint32_t>(p.throttle_time);
    wire.profile_entry_unit = kPage;
    wire.profile_start_delay = static_cast<uint32_t>(-1);
  }
  put(header.data_name, wire.data_name);
  put(header.data_format, wire.data_format);
  if (header.compact) {
    wire.compact = 1;
    wire.table_offset = header.table_offset;
    wire.chunk_size = header.chunk_size;
    wire.storage_grow_unit = header.storage_grow_unit;
    put(header.add_storage_command, wire.add_storage_command);
  }
  wire.journal_offset = header.journal_offset;
  wire.journal_size = header.journal_size;
  wire.clean_shutdown = header.clean_shutdown ? 1 : 0;
  wire.need_zero_init = header.need_zero_init ? 1 : 0;
  return wire;
}

}  // namespace imgfuse::fvd
