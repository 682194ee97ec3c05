// New images: the layout is computed first, then everything is written once, the header last.
#include <algorithm>
#include <bit>
#include <span>
#include <string_view>

#include "base/buffer.h"
#include "base/math.h"
#include "core/host_space.h"
#include "format/qcow2/header.h"
#include "format/qcow2/l2_entry.h"
#include "format/qcow2/layout.h"
#include "format/qcow2/qcow2.h"
#include "format/qcow2/refcounts.h"
#include "format/qcow2/table_writer.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint64_t kSector = 512;

/// A run of host clusters.
struct Run {
  uint64_t first = 0;
  uint64_t count = 0;
  uint64_t end() const { return first + count; }
};

/// Where everything lies, in host clusters: header, refcount table, refcount blocks, L1, L2 tables, data. What lies in
/// a data file has no part in it.
struct Layout {
  uint64_t cluster_size = 0;
  Run refcount_table;
  Run refcount_blocks;
  Run l1;
  Run l2;
  Run data;
  uint64_t total() const { return data.end(); }
  HostOffset offset(const Run& run) const { return HostOffset(run.first * cluster_size); }
  HostRange range(const Run& run) const { return {offset(run), run.count * cluster_size}; }
};

Extension feature_names() {
  struct Feature {
    uint8_t kind;  // 0 incompatible, 1 compatible, 2 autoclear
    uint8_t bit;
    std::string_view name;
  };
  constexpr Feature kFeatures[] = {
      {0, 0, "dirty bit"},        {0, 1, "corrupt bit"},         {0, 2, "external data file"},
      {0, 3, "compression type"}, {0, 4, "extended L2 entries"}, {1, 0, "lazy refcounts"},
      {2, 0, "bitmaps"},          {2, 1, "raw external data"},
  };
  Extension extension{wire::kExtensionFeatureNames, {}};
  for (const Feature& feature : kFeatures) {
    wire::FeatureName entry{};
    entry.kind = feature.kind;
    entry.bit = feature.bit;
    feature.name.copy(entry.name, sizeof entry.name);
    const auto bytes = std::as_bytes(std::span(&entry, 1));
    extension.data.insert(extension.data.end(), bytes.begin(), bytes.end());
  }
  return extension;
}

/// The header but for the places of its tables.
Header header_without_tables(const CreateOptions& options, uint64_t size) {
  Header header;
  header.version = options.version;
  header.cluster_bits = static_cast<uint32_t>(std::countr_zero(options.cluster_size));
  header.size = size;
  header.refcount_order = static_cast<uint32_t>(std::countr_zero(options.refcount_bits));
  if (options.lazy_refcounts) header.compatible |= kLazyRefcounts;
  if (options.compression_type == "zstd") {
    header.compression = Compression::zstd;
    header.incompatible |= kCompressionType;
  }
  if (options.extended_l2) header.incompatible |= kExtendedL2;
  header.backing_name = options.backing_file;
  header.backing_format = options.backing_format;
  header.data_file = options.data_file;
  if (options.data_file) header.incompatible |= kDataFile;
  if (options.data_file_raw) header.autoclear |= kRawDataFile;
  // Smaller clusters have better uses for 384 bytes (section 3).
  if (options.version >= 3 && options.cluster_size > 4096) header.extensions.push_back(feature_names());
  header.l1_entries = static_cast<uint32_t>(divide_up(size, header.l2_coverage()));
  return header;
}

Result<> check_size(uint64_t size, uint32_t cluster_size, bool extended_l2) {
  const uint64_t limit = max_virtual_size(static_cast<uint32_t>(std::countr_zero(cluster_size)), extended_l2);
  if (size > limit)
    return fail(ErrorCode::invalid, "a disk of {} bytes is too large for cluster size {}, which allows {}", size,
                cluster_size, limit);
  return {};
}

/// The layout with all clusters counted, refcount structures included: they grow until they cover themselves.
Result<Layout> plan(const Header& header, Preallocation preallocation) {
  const uint64_t cluster_size = header.cluster_size();
  Layout layout{cluster_size, {}, {}, {}, {}, {}};
  layout.l1.count = divide_up(uint64_t{header.l1_entries} * 8, cluster_size);
  if (preallocation != Preallocation::off || header.has_raw_data_file()) {
    layout.l2.count = header.l1_entries;
    if (!header.has_data_file()) layout.data.count = divide_up(header.size, cluster_size);
  }
  const uint64_t counted = layout.l1.count + layout.l2.count + layout.data.count;
  if (counted > kMaxHostOffset / cluster_size / 2)
    return fail(ErrorCode::invalid, "a preallocated disk of {} bytes is too large: host offsets end at 2^56",
                header.size);
  uint64_t& table = layout.refcount_table.count;
  uint64_t& blocks = layout.refcount_blocks.count;
  for (bool grown = true; grown;) {
    const uint64_t new_blocks = divide_up(1 + table + blocks + counted, header.refcounts_per_block());
    const uint64_t new_table = divide_up(new_blocks * 8, cluster_size);
    grown = new_blocks != blocks || new_table != table;
    blocks = new_blocks;
    table = new_table;
  }
  if (table * cluster_size > kMaxRefcountTableBytes)
    return fail(ErrorCode::invalid,
                "preallocating {} bytes with cluster size {} and {} refcount bits needs a refcount table of {} bytes, "
                "more than 8 MiB; larger clusters help",
                header.size, cluster_size, 1u << header.refcount_order, table * cluster_size);
  layout.refcount_table.first = 1;
  layout.refcount_blocks.first = layout.refcount_table.end();
  layout.l1.first = layout.refcount_blocks.end();
  layout.l2.first = layout.l1.end();
  layout.data.first = layout.l2.end();
  return layout;
}

/// Only what is not zero; the rest of each structure is zero already.
Result<> write_refcounts(Storage& storage, const Header& header, const Layout& layout) {
  TableWriter table(storage, layout.offset(layout.refcount_table));
  for (uint64_t i = 0; i < layout.refcount_blocks.count; ++i)
    IMG_TRY(table.entry((layout.refcount_blocks.first + i) * layout.cluster_size));
  IMG_TRY(table.finish());

  const uint64_t per_block = header.refcounts_per_block();
  const uint32_t bits = 1u << header.refcount_order;
  Buffer block = Buffer::zeroed(layout.cluster_size);
  uint64_t filled = 0;
  for (uint64_t i = layout.refcount_blocks.count; i-- > 0;) {  // the last one first: it is the shortest
    const uint64_t used = std::min(per_block, layout.total() - i * per_block);
    for (; filled < used; ++filled) set_refcount(block.bytes(), filled, bits, 1);
    const uint64_t bytes = round_up(divide_up(used * bits, 8), kSector);
    IMG_TRY(storage.write(HostOffset((layout.refcount_blocks.first + i) * layout.cluster_size),
                          block.bytes().first(bytes)));
  }
  return {};
}

/// The L2 tables, linked to the data clusters, and the L1 table that points at them; nothing without preallocation.
Result<> write_mapping(Storage& storage, const Header& header, const Layout& layout) {
  if (layout.l2.count == 0) return {};
  TableWriter l1(storage, layout.offset(layout.l1));
  for (uint64_t i = 0; i < layout.l2.count; ++i)
    IMG_TRY(l1.entry(L1Entry::of(layout.offset(layout.l2) + i * layout.cluster_size).raw));
  IMG_TRY(l1.finish());
  TableWriter l2(storage, layout.offset(layout.l2));
  const HostOffset data = header.has_data_file() ? HostOffset(0) : layout.offset(layout.data);
  for (uint64_t i = 0; i < divide_up(header.size, layout.cluster_size); ++i) {
    IMG_TRY(l2.entry((data + i * layout.cluster_size).bytes() | kCopied));
    // No subcluster is filled: a backing file, or zeros, still shows. A raw data file is the disk from the beginning.
    if (header.l2_format().extended) IMG_TRY(l2.entry(header.has_raw_data_file() ? L2Format::kAllSubclusters : 0));
  }
  return l2.finish();
}

/// Zeros everywhere, and nothing that opens until the new header is written. A file gets its size, and reads as zeros;
/// a device is full of old bytes.
Result<> clear(Storage& storage, const Layout& layout) {
  IMG_LET(const uint64_t old_size, storage.size());
  const uint64_t size = layout.total() * layout.cluster_size;
  const bool extensible = storage.info().extensible;
  if (!extensible && old_size < size)
    return fail(ErrorCode::no_space, "the image needs {} bytes, {} has {}", size, storage.info().name, old_size);
  if (old_size != 0) {
    IMG_TRY(storage.write_zeroes({HostOffset(0), layout.cluster_size}));
    IMG_TRY(storage.flush());
  }
  if (!extensible) return storage.write_zeroes({HostOffset(0), size});
  IMG_TRY(storage.resize(0));
  return storage.resize(size);
}

Result<> check_version_2(const CreateOptions& options) {
  if (options.version != 2) return {};
  if (options.refcount_bits != 16)
    return fail(ErrorCode::invalid, "{} refcount bits need version 3 (compat 1.1); version 2 has 16",
                options.refcount_bits);
  if (options.lazy_refcounts) return fail(ErrorCode::invalid, "lazy refcounts need version 3 (compat 1.1)");
  if (options.extended_l2) return fail(ErrorCode::invalid, "extended L2 entries need version 3 (compat 1.1)");
  if (options.data_file) return fail(ErrorCode::invalid, "a data file needs version 3 (compat 1.1)");
  if (options.compression_type != "zlib")
    return fail(ErrorCode::invalid, "compression type {} needs version 3 (compat 1.1)", options.compression_type);
  return {};
}

Result<> check_backing(const CreateOptions& options) {
  if (!options.backing_file) {
    if (options.backing_format) return fail(ErrorCode::invalid, "a backing format is given without a backing file");
    return {};
  }
  if (options.backing_file->empty()) return fail(ErrorCode::invalid, "the backing file name is empty");
  if (options.backing_file->size() > kMaxBackingName)
    return fail(ErrorCode::invalid, "the backing file name of {} bytes is longer than {}", options.backing_file->size(),
                kMaxBackingName);
  if (!options.backing_format)
    return fail(ErrorCode::invalid, "the format of backing file {} is not given; it is never guessed",
                *options.backing_file);
  IMG_TRY(check_backing_format(*options.backing_format));
  if (options.preallocation != Preallocation::off && !options.extended_l2)
    return fail(ErrorCode::invalid,
                "preallocation would hide the backing file; give one of the two, or extended L2 entries");
  return {};
}

Result<> check_data_file(const CreateOptions& options) {
  if (options.data_file && options.data_file->empty()) return fail(ErrorCode::invalid, "the data file name is empty");
  if (!options.data_file_raw) return {};
  if (!options.data_file) return fail(ErrorCode::invalid, "data_file_raw needs a data_file");
  if (options.backing_file)
    return fail(ErrorCode::invalid, "a raw data file alone equals the disk, so there can be no backing file");
  return {};
}

}  // namespace

Result<> check_create_options(const CreateOptions& options) {
  if (options.version != 2 && options.version != 3)
    return fail(ErrorCode::invalid, "qcow2 version {} is neither 2 (compat 0.10) nor 3 (compat 1.1)", options.version);
  if (!is_power_of_two(options.cluster_size) || options.cluster_size < 512 || options.cluster_size > 2_MiB)
    return fail(ErrorCode::invalid, "cluster size {} is not a power of two between 512 and 2 MiB",
                options.cluster_size);
  if (!is_power_of_two(options.refcount_bits) || options.refcount_bits > 64)
    return fail(ErrorCode::invalid, "{} refcount bits are not a power of two between 1 and 64", options.refcount_bits);
  if (options.compression_type != "zlib" && options.compression_type != "zstd")
    return fail(ErrorCode::invalid, "compression type {} is neither zlib nor zstd", options.compression_type);
  if (options.extended_l2 && options.cluster_size < 16_KiB)
    return fail(ErrorCode::invalid, "extended L2 entries need clusters of 16 KiB or more, not {} bytes",
                options.cluster_size);
  if (options.table_size) return fail(ErrorCode::invalid, "a qcow2 image has no table size; QED has");
  IMG_TRY(check_version_2(options));
  IMG_TRY(check_backing(options));
  IMG_TRY(check_data_file(options));
  const uint64_t size = options.size.value_or(0);
  IMG_TRY(check_size(size, options.cluster_size, options.extended_l2));
  const Header header = header_without_tables(options, round_up(size, 512));
  if (options.data_file && header.size > kMaxHostOffset)
    return fail(ErrorCode::invalid, "a disk of {} bytes is too large: offsets in a data file end at 2^56", header.size);
  IMG_TRY(encode_header(header));
  IMG_TRY(plan(header, options.preallocation));
  return {};
}

Result<> create(Storage& storage, const CreateOptions& options) {
  IMG_TRY(check_create_options(options));
  if (!options.size) return fail(ErrorCode::invalid, "the size of the new disk is not given");
  Header header = header_without_tables(options, round_up(*options.size, 512));
  IMG_LET(const Layout layout, plan(header, options.preallocation));
  header.refcount_table_offset = layout.offset(layout.refcount_table);
  header.refcount_table_clusters = static_cast<uint32_t>(layout.refcount_table.count);
  if (header.l1_entries != 0) header.l1_offset = layout.offset(layout.l1);
  IMG_LET(std::vector<std::byte> first_cluster, encode_header(header));
  first_cluster.resize(round_up(first_cluster.size(), kSector));

  IMG_TRY(clear(storage, layout));
  IMG_TRY(write_refcounts(storage, header, layout));
  IMG_TRY(write_mapping(storage, header, layout));
  IMG_TRY(preallocate(storage, layout.range(layout.data), options.preallocation));
  IMG_TRY(storage.flush());
  IMG_TRY(storage.write(HostOffset(0), first_cluster));
  return storage.flush();
}

}  // namespace imgfuse::qcow2
