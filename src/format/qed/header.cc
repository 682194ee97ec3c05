#include "format/qed/header.h"

#include <array>
#include <span>

#include "base/math.h"
#include "format/qed/layout.h"

namespace imgfuse::qed {
namespace {

constexpr uint64_t kKnownFeatures = kBackingFile | kNeedCheck | kBackingIsRaw;

Result<> check_geometry(const Header& header) {
  if (!is_power_of_two(header.cluster_size) || header.cluster_size < kMinClusterSize ||
      header.cluster_size > kMaxClusterSize)
    return fail(ErrorCode::corrupt, "cluster size {} is not a power of two between 4096 and 64 MiB",
                header.cluster_size);
  if (!is_power_of_two(header.table_size) || header.table_size > kMaxTableSize)
    return fail(ErrorCode::corrupt, "table size {} is not a power of two between 1 and 16", header.table_size);
  if (header.image_size % 512 != 0)
    return fail(ErrorCode::corrupt, "disk size {} is not a multiple of 512", header.image_size);
  if (const uint64_t limit = max_image_size(header.cluster_size, header.table_size); header.image_size > limit)
    return fail(ErrorCode::corrupt, "disk size {} is past {}, the largest of cluster size {} and table size {}",
                header.image_size, limit, header.cluster_size, header.table_size);
  if (uint64_t{header.header_size} * header.cluster_size > UINT32_MAX)
    return fail(ErrorCode::corrupt, "a header of {} clusters of {} bytes is longer than 4 GiB", header.header_size,
                header.cluster_size);
  return {};
}

Result<> check_l1(const Header& header, HostOffset end) {
  if (is_place(header, header.l1_offset, header.table_bytes(), end)) return {};
  return fail(ErrorCode::corrupt,
              "the L1 table at {:#x} with {} bytes does not lie between header ({:#x}) and end of the file ({:#x})",
              header.l1_offset.bytes(), header.table_bytes(), header.first_cluster().bytes(), end.bytes());
}

Result<> read_backing_name(Storage& storage, Header& header) {
  const uint64_t end = uint64_t{header.backing_name_offset} + header.backing_name_length;
  if (end > uint64_t{header.header_size} * header.cluster_size)
    return fail(ErrorCode::corrupt, "the backing file name at {:#x} with {} bytes lies outside the header",
                header.backing_name_offset, header.backing_name_length);
  if (header.backing_name_length > kMaxBackingName)
    return fail(ErrorCode::corrupt, "the backing file name of {} bytes is longer than {}", header.backing_name_length,
                kMaxBackingName);
  if (header.backing_name_length == 0)
    return fail(ErrorCode::corrupt, "the image has a backing file whose name is empty");
  std::string name(header.backing_name_length, '\0');
  IMG_TRY(storage.read(HostOffset(header.backing_name_offset), std::as_writable_bytes(std::span(name))));
  if (name.find('\0') != std::string::npos)
    return fail(ErrorCode::corrupt, "the backing file name {:?} has a NUL byte", name);
  header.backing_name = std::move(name);
  return {};
}

}  // namespace

/// Both factors may have 2^27: the product is formed only where it is known to fit.
uint64_t max_image_size(uint32_t cluster_size, uint32_t table_size) {
  const uint64_t entries = uint64_t{cluster_size} * table_size / 8;
  const uint64_t coverage = entries * cluster_size;
  return entries > kMaxFileBytes / coverage ? kMaxFileBytes : std::min(kMaxFileBytes, entries * coverage);
}

Result<HostOffset> end_of_file(Storage& storage, uint32_t cluster_size) {
  IMG_LET(const uint64_t size, storage.size());
  return HostOffset(round_down(size, cluster_size));
}

bool is_place(const Header& header, HostOffset offset, uint64_t length, HostOffset end) {
  return offset.bytes() % header.cluster_size == 0 && offset >= header.first_cluster() && offset < end &&
         length <= end - offset;
}

Result<Header> read_header(Storage& storage) {
  wire::Header raw;
  IMG_LET(const uint64_t size, storage.size());
  if (size < sizeof raw) return fail(ErrorCode::corrupt, "the file has {} bytes, a QED header 64", size);
  IMG_TRY(storage.read(HostOffset(0), std::as_writable_bytes(std::span(&raw, 1))));
  if (raw.magic != wire::kMagic)
    return fail(ErrorCode::invalid, "not a QED image: it begins with {:#010x}", +raw.magic);
  Header header{.cluster_size = raw.cluster_size,
                .table_size = raw.table_size,
                .header_size = raw.header_size,
                .features = raw.features,
                .compat_features = raw.compat_features,
                .autoclear_features = raw.autoclear_features,
                .l1_offset = HostOffset(raw.l1_offset),
                .image_size = raw.image_size,
                .backing_name_offset = raw.backing_name_offset,
                .backing_name_length = raw.backing_name_length,
                .backing_name = {}};
  if (const uint64_t unknown = header.features & ~kKnownFeatures; unknown != 0)
    return fail(ErrorCode::unsupported, "the image needs features that imgfuse does not know: bits {:#x}", unknown);
  IMG_TRY(check_geometry(header));
  IMG_LET(const HostOffset end, end_of_file(storage, header.cluster_size));
  IMG_TRY(check_l1(header, end));
  if (header.features & kBackingFile) IMG_TRY(read_backing_name(storage, header));
  return header;
}

Result<> write_header(Storage& storage, const Header& header, ConstBytes behind) {
  const wire::Header raw{.magic = wire::kMagic,
                         .cluster_size = header.cluster_size,
                         .table_size = header.table_size,
                         .header_size = header.header_size,
                         .features = header.features,
                         .compat_features = header.compat_features,
                         .autoclear_features = header.autoclear_features,
                         .l1_offset = header.l1_offset.bytes(),
                         .image_size = header.image_size,
                         .backing_name_offset = header.backing_name_offset,
                         .backing_name_length = header.backing_name_length};
  return storage.write(HostOffset(0), std::array{ConstBytes(std::as_bytes(std::span(&raw, 1))), behind});
}

Result<> clear_autoclear_features(Storage& storage, Header& header) {
  if (header.autoclear_features == 0) return {};
  header.autoclear_features = 0;
  IMG_TRY(write_header(storage, header));
  return storage.flush();
}

}  // namespace imgfuse::qed
