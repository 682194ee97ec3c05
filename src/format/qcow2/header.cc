#include "format/qcow2/header.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <span>

#include "base/buffer.h"
#include "base/math.h"
#include "format/qcow2/layout.h"
#include "format/qcow2/qcow2.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint64_t kKnownIncompatible = kDirty | kCorrupt | kDataFile | kCompressionType | kExtendedL2;
constexpr uint32_t kMinClusterBits = 9;
constexpr uint32_t kMaxClusterBits = 21;
constexpr uint64_t kTableEndLimit = uint64_t{1} << 63;

template <class T>
Bytes bytes_of(T& value) {
  return std::as_writable_bytes(std::span(&value, 1));
}

/// Text as the image stores it, which other programs read as a C string: it ends at the first NUL.
std::string text_of(ConstBytes bytes) {
  const auto* begin = reinterpret_cast<const char*>(bytes.data());
  return {begin, std::find(begin, begin + bytes.size(), '\0')};
}

Result<> check_identity(const wire::Header& raw, uint64_t file_size) {
  const uint32_t magic = raw.magic;
  const uint32_t version = raw.version;
  const uint32_t cluster_bits = raw.cluster_bits;
  if (magic != wire::kMagic)
    return fail(ErrorCode::corrupt, "not a qcow2 image: it starts with {:08x}, not {:08x}", magic, wire::kMagic);
  if (version != 2 && version != 3)
    return fail(ErrorCode::unsupported, "qcow2 version {} (header byte 4) is neither 2 nor 3", version);
  const uint32_t shortest = version == 2 ? wire::kHeaderLengthV2 : wire::kHeaderLengthV3;
  if (file_size < shortest)
    return fail(ErrorCode::corrupt, "the file ends inside the header: it has {} bytes, a version {} header at least {}",
                file_size, version, shortest);
  if (cluster_bits < kMinClusterBits || cluster_bits > kMaxClusterBits)
    return fail(ErrorCode::corrupt, "cluster_bits {} (header byte 20) is not between {} and {}", cluster_bits,
                kMinClusterBits, kMaxClusterBits);
  if (version == 3 && (raw.header_length < wire::kHeaderLengthV3 || raw.header_length > uint64_t{1} << cluster_bits))
    return fail(ErrorCode::corrupt, "header_length {} (header byte 100) is not between {} and the cluster size {}",
                uint32_t{raw.header_length}, wire::kHeaderLengthV3, uint64_t{1} << cluster_bits);
  return {};
}

/// The fields at fixed places, not yet checked beyond check_identity().
Header fixed_fields(const wire::Header& raw) {
  Header header;
  header.version = raw.version;
  header.cluster_bits = raw.cluster_bits;
  header.size = round_down(raw.size, 512);  // as QEMU, which counts sectors
  header.crypt_method = raw.crypt_method;
  header.l1_entries = raw.l1_entries;
  header.l1_offset = HostOffset(raw.l1_offset);
  header.refcount_table_offset = HostOffset(raw.refcount_table_offset);
  header.refcount_table_clusters = raw.refcount_table_clusters;
  header.snapshot_count = raw.snapshot_count;
  header.snapshots_offset = HostOffset(raw.snapshots_offset);
  if (header.version == 2) {
    header.header_length = wire::kHeaderLengthV2;
    return header;
  }
  header.incompatible = raw.incompatible;
  header.compatible = raw.compatible;
  header.autoclear = raw.autoclear;
  header.refcount_order = raw.refcount_order;
  header.header_length = raw.header_length;
  return header;
}

Result<> check_compression_type(const wire::Header& raw, Header& header) {
  const bool present = header.header_length > offsetof(wire::Header, compression_type);
  const unsigned type = present ? uint8_t{raw.compression_type} : 0;
  const bool announced = (header.incompatible & kCompressionType) != 0;
  if (announced != (type != 0))
    return fail(ErrorCode::corrupt,
                "compression type {} (header byte 104) contradicts incompatible feature bit 3, which is {}", type,
                announced ? "set" : "clear");
  if (type > 1)
    return fail(ErrorCode::unsupported, "compression type {} (header byte 104) is neither 0 (zlib) nor 1 (zstd)", type);
  header.compression = Compression{static_cast<uint8_t>(type)};
  return {};
}

/// Reads the extensions in `area`, the part of the first cluster from the end of the header to the backing name.
/// `position` is where it starts, for messages.
Result<std::vector<Extension>> read_extensions(ConstBytes area, uint64_t position) {
  std::vector<Extension> extensions;
  while (!area.empty()) {
    wire::ExtensionHeader raw;
    if (area.size() < sizeof raw)
      return fail(ErrorCode::corrupt, "header extension at byte {} has no room before the area's end at {}", position,
                  position + area.size());
    std::memcpy(&raw, area.data(), sizeof raw);
    const uint32_t type = raw.type;
    const uint32_t length = raw.length;
    area = area.subspan(sizeof raw);
    if (length > area.size())
      return fail(ErrorCode::corrupt, "header extension {:08x} at byte {} is {} bytes long, but only {} are left", type,
                  position, length, area.size());
    if (type == wire::kExtensionEnd) break;
    const ConstBytes data = area.first(length);
    extensions.push_back({type, {data.begin(), data.end()}});
    const size_t padded = std::min<size_t>(round_up(length, 8), area.size());
    area = area.subspan(padded);
    position += sizeof raw + padded;
  }
  return extensions;
}

/// What the image's own feature name table calls an incompatible bit; its number if it does not say.
std::string feature_name(const std::vector<Extension>& extensions, unsigned bit) {
  for (const Extension& extension : extensions) {
    if (extension.type != wire::kExtensionFeatureNames) continue;
    for (size_t at = 0; at + sizeof(wire::FeatureName) <= extension.data.size(); at += sizeof(wire::FeatureName)) {
      wire::FeatureName entry;
      std::memcpy(&entry, extension.data.data() + at, sizeof entry);
      if (entry.kind != 0 || entry.bit != bit) continue;
      std::string name = text_of(std::as_bytes(std::span(entry.name)));
      std::replace_if(
          name.begin(), name.end(), [](char c) { return static_cast<unsigned char>(c) < ' '; }, '?');
      if (!name.empty()) return fmt::format("\"{}\" (bit {})", name, bit);
    }
  }
  return fmt::format("bit {}", bit);
}

Result<> check_unknown_features(const Header& header, const std::vector<Extension>& extensions) {
  std::string names;
  for (uint64_t unknown = header.incompatible & ~kKnownIncompatible; unknown != 0; unknown &= unknown - 1) {
    if (!names.empty()) names += ", ";
    names += feature_name(extensions, static_cast<unsigned>(std::countr_zero(unknown)));
  }
  if (names.empty()) return {};
  return fail(ErrorCode::unsupported, "the image needs incompatible features that imgfuse does not know: {}", names);
}

/// A table that the header points at: aligned, and its end representable.
Result<> check_table(const Header& header, const char* what, unsigned field, HostOffset offset, uint64_t length) {
  if (offset.bytes() % header.cluster_size() != 0)
    return fail(ErrorCode::corrupt, "{} offset {:#x} (header byte {}) is not a multiple of the cluster size {}", what,
                offset.bytes(), field, header.cluster_size());
  if (offset.bytes() >= kTableEndLimit || length > kTableEndLimit - offset.bytes())
    return fail(ErrorCode::corrupt, "{} offset {:#x} (header byte {}) is not below 2^63", what, offset.bytes(), field);
  return {};
}

uint64_t l1_bytes(const Header& header) { return uint64_t{header.l1_entries} * 8; }
uint64_t refcount_table_bytes(const Header& header) { return header.refcount_table_clusters * header.cluster_size(); }

Result<> check_tables(const Header& header, Purpose purpose) {
  if (header.refcount_table_clusters == 0 && purpose != Purpose::repair)
    return fail(ErrorCode::corrupt,
                "the refcount table has 0 clusters (header byte 56); `imgfuse check --repair all` can build a new one");
  if (refcount_table_bytes(header) > kMaxRefcountTableBytes)
    return fail(ErrorCode::corrupt, "refcount table of {} clusters (header byte 56) is larger than 8 MiB",
                header.refcount_table_clusters);
  IMG_TRY(check_table(header, "refcount table", 48, header.refcount_table_offset, refcount_table_bytes(header)));

  if (header.snapshot_count > kMaxSnapshots)
    return fail(ErrorCode::corrupt, "{} snapshots (header byte 60) are more than {}", header.snapshot_count,
                kMaxSnapshots);
  IMG_TRY(check_table(header, "snapshot table", 64, header.snapshots_offset, 0));

  if (header.l1_entries > kMaxL1Entries)
    return fail(ErrorCode::corrupt, "L1 table of {} entries (header byte 36) is larger than 32 MiB", header.l1_entries);
  IMG_TRY(check_table(header, "L1 table", 40, header.l1_offset, l1_bytes(header)));
  if (header.l1_entries != 0 && header.l1_offset == HostOffset(0))
    return fail(ErrorCode::corrupt, "L1 table offset 0 (header byte 40) is the header's own place");
  const uint64_t needed = divide_up(header.size, header.l2_coverage());
  if (header.l1_entries < needed)
    return fail(ErrorCode::corrupt,
                "L1 table of {} entries (header byte 36) is too small for {} bytes of disk, which need {}",
                header.l1_entries, header.size, needed);
  return {};
}

Result<> check_backing_name_place(const Header& header, const wire::Header& raw) {
  const uint64_t offset = raw.backing_name_offset;
  const uint64_t length = raw.backing_name_length;
  if (offset == 0) return {};
  if (offset < header.header_length || offset > header.cluster_size())
    return fail(ErrorCode::corrupt,
                "backing file name at byte {} (header byte 8) is not between the header's end {} and the first "
                "cluster's end {}",
                offset, header.header_length, header.cluster_size());
  if (length > kMaxBackingName)
    return fail(ErrorCode::corrupt, "backing file name of {} bytes (header byte 16) is longer than {}", length,
                kMaxBackingName);
  if (length > header.cluster_size() - offset)
    return fail(ErrorCode::corrupt,
                "backing file name at byte {} with {} bytes (header bytes 8 and 16) passes the first cluster's end {}",
                offset, length, header.cluster_size());
  return {};
}

/// Moves what Header names out of the extensions; checks the extensions whose size the format
/// fixes.
Result<> adopt_extensions(Header& header, std::vector<Extension> extensions) {
  bool encryption_header = false;
  for (Extension& extension : extensions) {
    const size_t length = extension.data.size();
    switch (extension.type) {
      case wire::kExtensionBackingFormat:
        if (length > kMaxBackingFormat)
          return fail(ErrorCode::corrupt, "backing format name of {} bytes is longer than {}", length,
                      kMaxBackingFormat);
        header.backing_format = text_of(extension.data);
        continue;
      case wire::kExtensionDataFile:
        if (length > kMaxDataFileName)
          return fail(ErrorCode::corrupt, "data file name of {} bytes is longer than {}", length, kMaxDataFileName);
        header.data_file = text_of(extension.data);
        continue;
      case wire::kExtensionCountsAhead:
        header.counts_ahead = true;
        continue;
      case wire::kExtensionPadding:  // left by a crash; whoever writes the next header closes the gap
        continue;
      case wire::kExtensionBitmaps:
        if (length != 24)
          return fail(ErrorCode::corrupt, "bitmaps header extension has {} bytes instead of 24", length);
        break;
      case wire::kExtensionEncryption:
        if (header.crypt_method != 2)
          return fail(ErrorCode::corrupt,
                      "encryption header extension in an image with encryption method {} (header byte 32) instead of 2",
                      header.crypt_method);
        if (length != 16)
          return fail(ErrorCode::corrupt, "encryption header extension has {} bytes instead of 16", length);
        encryption_header = true;
        break;
      default:
        break;
    }
    header.extensions.push_back(std::move(extension));
  }
  if (header.crypt_method == 2 && !encryption_header)
    return fail(ErrorCode::corrupt, "LUKS encryption (header byte 32) without an encryption header extension");
  return {};
}

/// Refuses what this program cannot read or write, by name.
Result<> check_supported(const Header& header) {
  if (header.crypt_method == 1) return fail(ErrorCode::unsupported, "AES encryption is not supported");
  if (header.crypt_method == 2) return fail(ErrorCode::unsupported, "LUKS encryption is not supported");
  return {};
}

/// A table whose place makes it unusable, although the header can be parsed.
Result<> check_place(const char* what, HostRange table, uint64_t file_size) {
  if (table.begin.bytes() >= file_size)
    return fail(ErrorCode::corrupt, "{} at {:#x} lies past the end of the file ({:#x})", what, table.begin.bytes(),
                file_size);
  return {};
}

Result<> check_readable(const Header& header, uint64_t file_size) {
  IMG_TRY(check_supported(header));
  if (header.l1_entries == 0) return {};
  return check_place("L1 table", {header.l1_offset, l1_bytes(header)}, file_size);
}

/// Before anything is changed: no table may lie on another one.
Result<> check_writable(const Header& header, uint64_t file_size) {
  if (header.incompatible & kCorrupt)
    return fail(ErrorCode::corrupt,
                "the image is marked corrupt; it can be read, and `imgfuse check --repair all` may mend it");
  const HostRange first_cluster{HostOffset(0), header.cluster_size()};
  const HostRange refcount_table{header.refcount_table_offset, refcount_table_bytes(header)};
  const HostRange l1{header.l1_offset, l1_bytes(header)};
  if (refcount_table.overlaps(first_cluster))
    return fail(ErrorCode::corrupt, "refcount table offset 0 (header byte 48) is the header's own place");
  if (!l1.empty() && refcount_table.overlaps(l1))
    return fail(ErrorCode::corrupt, "refcount table at {:#x} and L1 table at {:#x} overlap",
                refcount_table.begin.bytes(), l1.begin.bytes());
  return check_place("refcount table", refcount_table, file_size);
}

Result<> check_for(Purpose purpose, const Header& header, uint64_t file_size) {
  if (purpose == Purpose::read || purpose == Purpose::write) IMG_TRY(check_readable(header, file_size));
  if (purpose == Purpose::write) IMG_TRY(check_writable(header, file_size));
  return {};
}

void append(std::vector<std::byte>& out, ConstBytes bytes) { out.insert(out.end(), bytes.begin(), bytes.end()); }
void pad_to_8(std::vector<std::byte>& out) { out.resize(round_up(out.size(), 8)); }

void append_extension(std::vector<std::byte>& out, uint32_t type, ConstBytes data) {
  wire::ExtensionHeader raw;
  raw.type = type;
  raw.length = static_cast<uint32_t>(data.size());
  append(out, bytes_of(raw));
  append(out, data);
  pad_to_8(out);
}

wire::Header wire_header(const Header& header) {
  wire::Header raw;
  raw.magic = wire::kMagic;
  raw.version = header.version;
  raw.cluster_bits = header.cluster_bits;
  raw.size = header.size;
  raw.crypt_method = header.crypt_method;
  raw.l1_entries = header.l1_entries;
  raw.l1_offset = header.l1_offset.bytes();
  raw.refcount_table_offset = header.refcount_table_offset.bytes();
  raw.refcount_table_clusters = header.refcount_table_clusters;
  raw.snapshot_count = header.snapshot_count;
  raw.snapshots_offset = header.snapshots_offset.bytes();
  raw.incompatible = header.incompatible;
  raw.compatible = header.compatible;
  raw.autoclear = header.autoclear;
  raw.refcount_order = header.refcount_order;
  raw.header_length = static_cast<uint32_t>(sizeof raw + round_up(header.unknown_tail.size(), 8));
  raw.compression_type = static_cast<uint8_t>(header.compression);
  return raw;
}

}  // namespace

bool probe(ConstBytes first_bytes) {
  if (first_bytes.size() < 8) return false;
  be<uint32_t> magic;
  be<uint32_t> version;
  std::memcpy(&magic, first_bytes.data(), sizeof magic);
  std::memcpy(&version, first_bytes.data() + 4, sizeof version);
  return magic == wire::kMagic && version >= 2;
}

namespace {

/// Nothing if who has the image open has replaced the header meanwhile, so that its parts do not belong together.
Result<std::optional<Header>> try_read_header(Storage& storage, Purpose purpose) {
  IMG_LET(const uint64_t file_size, storage.size());
  wire::Header raw;
  IMG_TRY(storage.read(HostOffset(0), bytes_of(raw)));
  IMG_TRY(check_identity(raw, file_size));
  Header header = fixed_fields(raw);
  IMG_TRY(check_backing_name_place(header, raw));

  Buffer cluster(header.cluster_size());
  IMG_TRY(storage.read(HostOffset(0), cluster.bytes()));
  if (std::memcmp(cluster.bytes().data(), &raw, sizeof raw) != 0) return std::nullopt;
  const uint64_t name_offset = raw.backing_name_offset;
  const uint64_t extensions_end = name_offset != 0 ? name_offset : header.cluster_size();
  auto extensions = read_extensions(
      cluster.bytes().subspan(header.header_length, extensions_end - header.header_length), header.header_length);

  IMG_TRY(check_compression_type(raw, header));
  IMG_TRY(check_unknown_features(header, extensions ? *extensions : std::vector<Extension>{}));
  if ((header.incompatible & kExtendedL2) && header.cluster_bits < 14)
    return fail(ErrorCode::corrupt, "extended L2 entries need cluster_bits of 14 or more, header byte 20 says {}",
                header.cluster_bits);
  if (header.refcount_order > 6)
    return fail(ErrorCode::corrupt, "refcount_order {} (header byte 96) is larger than 6", header.refcount_order);
  if (header.crypt_method > 2)
    return fail(ErrorCode::unsupported, "encryption method {} (header byte 32) is not 0, 1 or 2", header.crypt_method);
  IMG_TRY(check_tables(header, purpose));
  if (!extensions) return fail(std::move(extensions).error());
  IMG_TRY(adopt_extensions(header, std::move(*extensions)));

  if (header.header_length > sizeof raw) {
    const ConstBytes tail = cluster.bytes().subspan(sizeof raw, header.header_length - sizeof raw);
    header.unknown_tail.assign(tail.begin(), tail.end());
  }
  if (name_offset != 0) {
    std::string name = text_of(cluster.bytes().subspan(name_offset, raw.backing_name_length));
    if (!name.empty()) header.backing_name = std::move(name);
  }
  IMG_TRY(check_for(purpose, header, file_size));
  return header;
}

}  // namespace

Result<Header> read_header(Storage& storage, Purpose purpose) {
  constexpr unsigned kTries = 10;
  for (unsigned i = 0; i < kTries; ++i) {
    IMG_LET(std::optional<Header> header, try_read_header(storage, purpose));
    if (header) return *std::move(header);
  }
  return fail(ErrorCode::busy, "the header was changed {} times while it was read", kTries);
}

Result<std::vector<std::byte>> encode_header(const Header& header) {
  if (header.backing_name && header.backing_name->size() > kMaxBackingName)
    return fail(ErrorCode::invalid, "backing file name of {} bytes is longer than {}", header.backing_name->size(),
                kMaxBackingName);
  if (header.backing_format && header.backing_format->size() > kMaxBackingFormat)
    return fail(ErrorCode::invalid, "backing format name of {} bytes is longer than {}", header.backing_format->size(),
                kMaxBackingFormat);
  if (header.data_file && header.data_file->size() > kMaxDataFileName)
    return fail(ErrorCode::invalid, "data file name of {} bytes is longer than {}", header.data_file->size(),
                kMaxDataFileName);

  wire::Header raw = wire_header(header);
  std::vector<std::byte> out;
  append(out, header.version == 2 ? bytes_of(raw).first(wire::kHeaderLengthV2) : bytes_of(raw));
  if (header.version != 2) append(out, header.unknown_tail);
  pad_to_8(out);
  if (header.backing_format)
    append_extension(out, wire::kExtensionBackingFormat, std::as_bytes(std::span(*header.backing_format)));
  if (header.data_file) append_extension(out, wire::kExtensionDataFile, std::as_bytes(std::span(*header.data_file)));
  if (header.counts_ahead) append_extension(out, wire::kExtensionCountsAhead, {});
  for (const Extension& extension : header.extensions) append_extension(out, extension.type, extension.data);
  append_extension(out, wire::kExtensionEnd, {});
  if (header.backing_name) {
    raw.backing_name_offset = out.size();
    raw.backing_name_length = static_cast<uint32_t>(header.backing_name->size());
    std::memcpy(out.data(), &raw, wire::kHeaderLengthV2);
    append(out, std::as_bytes(std::span(*header.backing_name)));
  }
  if (out.size() > header.cluster_size())
    return fail(ErrorCode::no_space,
                "the header with its extensions and backing file name needs {} bytes, a cluster has {}", out.size(),
                header.cluster_size());
  return out;
}

uint64_t max_virtual_size(uint32_t cluster_bits, bool extended_l2) {
  const uint64_t l2_coverage = uint64_t{1} << (2 * cluster_bits - (extended_l2 ? 4 : 3));
  return kMaxL1Entries * l2_coverage;
}

}  // namespace imgfuse::qcow2
