// New images: an L1 table of zeros, and the header last.
#include <bit>
#include <span>

#include "base/math.h"
#include "format/qed/header.h"
#include "format/qed/qed.h"

namespace imgfuse::qed {
namespace {

constexpr uint32_t kDefaultTableSize = 4;

uint32_t table_size_of(const CreateOptions& options) { return options.table_size.value_or(kDefaultTableSize); }

Result<> check_foreign_options(const CreateOptions& options) {
  const auto refuse = [](bool wanted, const char* what) -> Result<> {
    return wanted ? fail(ErrorCode::invalid, "a QED image has no {}; qcow2 has", what) : Result<>{};
  };
  const CreateOptions defaults;
  IMG_TRY(refuse(options.version != defaults.version, "versions"));
  IMG_TRY(refuse(options.refcount_bits != defaults.refcount_bits || options.lazy_refcounts, "reference counts"));
  IMG_TRY(refuse(options.extended_l2, "extended L2 entries"));
  IMG_TRY(refuse(options.data_file.has_value() || options.data_file_raw, "data file"));
  IMG_TRY(refuse(options.compression_type != defaults.compression_type, "compression"));
  return refuse(options.preallocation != Preallocation::off, "preallocation");
}

/// QEMU computes table and disk sizes modulo 2^64, and does not open images with tables of one cluster.
Result<> check_exchangeable(uint32_t cluster_size, uint32_t table_size) {
  if (table_size == 1)
    return fail(ErrorCode::invalid, "QEMU cannot open QED images with table_size=1; 2, 4, 8 and 16 are possible");
  const uint64_t entries = uint64_t{cluster_size} * table_size / 8;
  if (2 * std::countr_zero(entries) + std::countr_zero(cluster_size) >= 64)
    return fail(ErrorCode::invalid,
                "QEMU cannot open QED images with cluster size {} and table_size={}: their largest disk has 2^64 bytes "
                "or more",
                cluster_size, table_size);
  return {};
}

Result<> check_backing(const CreateOptions& options) {
  if (!options.backing_file) {
    if (options.backing_format) return fail(ErrorCode::invalid, "a backing format is given without a backing file");
    return {};
  }
  const std::string& name = *options.backing_file;
  if (!options.backing_format)
    return fail(ErrorCode::invalid, "the format of backing file {} is not given; it is never guessed", name);
  IMG_TRY(check_backing_format(*options.backing_format));
  const uint64_t room = std::min<uint64_t>(kMaxBackingName, options.cluster_size - kHeaderBytes);
  if (name.empty()) return fail(ErrorCode::invalid, "the backing file name is empty");
  if (name.size() > room)
    return fail(ErrorCode::invalid, "the backing file name of {} bytes is longer than {}", name.size(), room);
  if (name.find('\0') != std::string::npos)
    return fail(ErrorCode::invalid, "the backing file name {:?} has a NUL byte", name);
  return {};
}

Result<> check_geometry(const CreateOptions& options) {
  const uint32_t table_size = table_size_of(options);
  if (!is_power_of_two(options.cluster_size) || options.cluster_size < kMinClusterSize ||
      options.cluster_size > kMaxClusterSize)
    return fail(ErrorCode::invalid, "cluster size {} is not a power of two between 4096 and 64 MiB",
                options.cluster_size);
  if (!is_power_of_two(table_size) || table_size > kMaxTableSize)
    return fail(ErrorCode::invalid, "table size {} is not a power of two between 1 and 16", table_size);
  const uint64_t limit = max_image_size(options.cluster_size, table_size);
  if (options.size && *options.size > limit)
    return fail(ErrorCode::invalid,
                "a disk of {} bytes is too large for cluster size {} and table size {}, which allow {}", *options.size,
                options.cluster_size, table_size, limit);
  return {};
}

}  // namespace

Result<> check_create_options(const CreateOptions& options) {
  IMG_TRY(check_foreign_options(options));
  IMG_TRY(check_geometry(options));
  IMG_TRY(check_exchangeable(options.cluster_size, table_size_of(options)));
  return check_backing(options);
}

Result<> create(Storage& storage, const CreateOptions& options) {
  IMG_TRY(check_foreign_options(options));
  IMG_TRY(check_geometry(options));
  IMG_TRY(check_backing(options));
  if (!options.size) return fail(ErrorCode::invalid, "the size of the new disk is not given");
  if (!storage.info().extensible)
    return fail(ErrorCode::unsupported, "the length of a QED image has a meaning: it has to be a regular file");
  Header header{.cluster_size = options.cluster_size,
                .table_size = table_size_of(options),
                .l1_offset = HostOffset(options.cluster_size),
                .image_size = round_up(*options.size, 512),
                .backing_name = {}};
  IMG_TRY(storage.resize(0));
  IMG_TRY(storage.resize(header.cluster_size + header.table_bytes()));
  if (options.backing_file) {
    header.features = kBackingFile | (*options.backing_format == "raw" ? kBackingIsRaw : 0);
    header.backing_name_offset = kHeaderBytes;
    header.backing_name_length = static_cast<uint32_t>(options.backing_file->size());
    IMG_TRY(storage.write(HostOffset(kHeaderBytes), std::as_bytes(std::span(*options.backing_file))));
  }
  IMG_TRY(storage.flush());
  IMG_TRY(write_header(storage, header));
  return storage.flush();
}

}  // namespace imgfuse::qed
