#include "support/builders.h"

#include <unistd.h>

#include <cstdlib>

#include "core/cluster_cache.h"
#include "format/raw/raw.h"
#include "format/registry.h"
#include "support/order_storage.h"

namespace imgfuse::test {
namespace {

BackingOpener raw_backing(const MemImage& content) {
  return [content](const std::string&, const std::optional<std::string>&) {
    return Result<std::unique_ptr<Disk>>(make_raw_disk(content));
  };
}

DataFileOpener data_file(const std::shared_ptr<Storage>& data) {
  return [data](const std::optional<std::string>&) -> Result<std::shared_ptr<Storage>> {
    if (!data) return fail(ErrorCode::not_found, "no data file is given");
    return data;
  };
}

/// Names that are assigned later make gcc 12 warn of bytes that it takes for uninitialised.
CreateOptions over(const std::optional<std::string>& backing) {
  return {.backing_file = backing, .backing_format = backing ? std::optional<std::string>("raw") : std::nullopt};
}

}  // namespace

MemImage make_qcow2(const Qcow2Spec& spec) {
  CreateOptions options = over(spec.backing);
  options.size = spec.size;
  options.cluster_size = spec.cluster_size;
  options.refcount_bits = spec.refcount_bits;
  options.version = spec.version;
  options.extended_l2 = spec.extended_l2;
  options.lazy_refcounts = spec.lazy_refcounts;
  options.compression_type = spec.compression;
  if (spec.data_file) options.data_file = "data.raw";
  options.data_file_raw = spec.data_file_raw;
  MemStorage storage;
  must(qcow2::create(storage, options));
  return storage.image();
}

std::unique_ptr<Disk> make_raw_disk(MemImage content) {
  return must(raw::open(std::make_shared<MemStorage>(std::move(content), false), {.read_only = true}));
}

MemImage make_qed(const QedSpec& spec) {
  MemStorage storage;
  must(qed::create(storage, {.format = "qed",
                             .size = spec.size,
                             .backing_file = spec.backing,
                             .backing_format = spec.backing ? std::optional<std::string>("raw") : std::nullopt,
                             .cluster_size = spec.cluster_size,
                             .table_size = spec.table_size}));
  return storage.image();
}

MemImage make_fvd(const FvdSpec& spec) {
  CreateOptions options = over(spec.base ? std::optional(spec.base_name) : std::nullopt);
  options.format = "fvd";
  options.size = spec.size;
  options.fvd = spec.own;
  if (spec.data_file) options.data_file = *spec.data_file;
  std::unique_ptr<Disk> base;
  if (spec.base) {
    MemImage content;
    content.resize(spec.base_size);
    base = make_raw_disk(content);
  }
  must(fvd::check_create_options(options));
  MemStorage storage;
  must(fvd::create(storage, options, base.get()));
  return storage.image();
}

Result<std::unique_ptr<Disk>> open_qcow2(std::shared_ptr<Storage> storage, const OpenSpec& spec) {
  qcow2::OpenParameters parameters;
  parameters.read_only = spec.read_only;
  parameters.metadata_cache = spec.metadata_cache;
  parameters.compress = spec.compress;
  if (spec.compressed_cache > 0) parameters.compressed_cache = std::make_shared<ClusterCache>(spec.compressed_cache);
  parameters.open_backing = raw_backing(spec.backing);
  parameters.open_data_file = data_file(spec.data);
  return qcow2::open(std::move(storage), std::move(parameters));
}

Result<std::unique_ptr<Disk>> open_fvd(std::shared_ptr<Storage> storage, const OpenSpec& spec) {
  fvd::OpenParameters parameters;
  parameters.read_only = spec.read_only;
  parameters.open_backing = raw_backing(spec.backing);
  parameters.open_data_file = data_file(spec.data);
  return fvd::open(std::move(storage), std::move(parameters));
}

Result<std::unique_ptr<Disk>> open_image(std::shared_ptr<Storage> storage, const OpenSpec& spec) {
  IMG_LET(const Format* format, probe_format(*storage));
  if (format->name == "fvd") return open_fvd(std::move(storage), spec);
  if (format->name != "qed") return open_qcow2(std::move(storage), spec);
  return qed::open(std::move(storage), {.read_only = spec.read_only,
                                        .metadata_cache = spec.metadata_cache,
                                        .open_backing = raw_backing(spec.backing),
                                        .clock = spec.clock});
}

MemImage Qcow2Kind::image(const ImageSpec& spec) {
  return make_qcow2({.size = spec.size, .cluster_size = spec.cluster_size, .backing = spec.backing});
}

MemImage Qcow2Kind::any_image(const ImageSpec& spec, Rng& rng) {
  const uint32_t version = rng.one_in(4) ? 2 : 3;
  const uint32_t refcount_bits = version == 2 ? 16 : 1u << rng.below(7);
  return make_qcow2({spec.size, spec.cluster_size, refcount_bits, version, spec.backing});
}

MemImage QedKind::image(const ImageSpec& spec) { return make_qed({spec.size, spec.cluster_size, 1, spec.backing}); }

MemImage QedKind::any_image(const ImageSpec& spec, Rng& rng) {
  return make_qed({spec.size, spec.cluster_size, 1u << rng.below(5), spec.backing});
}

MemImage FvdKind::image(const ImageSpec& spec) {
  FvdSpec fvd{.size = spec.size, .base = spec.backing.has_value(), .base_size = spec.backing_size.value_or(spec.size)};
  if (spec.backing) fvd.base_name = *spec.backing;
  fvd.own.compact = true;
  fvd.own.chunk_size = fvd.own.storage_grow_unit = spec.cluster_size;
  if (fvd.base) fvd.own.block_size = spec.cluster_size;
  fvd.own.journal_size = 2_MiB;  // from which a longer table is taken
  return make_fvd(fvd);
}

MemImage FvdKind::any_image(const ImageSpec& spec, Rng& rng) {
  FvdSpec fvd{.size = spec.size, .base = spec.backing.has_value(), .base_size = spec.backing_size.value_or(spec.size)};
  fvd.own.compact = rng.one_in(2);
  fvd.own.chunk_size = spec.cluster_size;
  if (fvd.base) fvd.own.block_size = std::max<uint64_t>(512, spec.cluster_size >> rng.below(4));
  fvd.own.journal = fvd.own.compact || !rng.one_in(4);  // room for a longer table
  fvd.own.journal_size = 1_MiB;
  return make_fvd(fvd);
}

MemImage make_image(std::string_view format, const ImageSpec& spec) {
  if (format == "qcow2") return Qcow2Kind::image(spec);
  if (format == "qed") return QedKind::image(spec);
  if (format == "fvd") return FvdKind::image(spec);
  MemImage raw;
  raw.resize(spec.size);
  return raw;
}

WatchedDisk open_watched(const MemImage& image, const OpenSpec& spec) {
  auto memory = std::make_shared<MemStorage>(image);
  auto disk = must(open_image(std::make_shared<OrderStorage>(memory, image), spec));
  return {std::move(memory), std::move(disk)};
}

MemImage reopened(const MemImage& image, const OpenSpec& spec) {
  const auto storage = std::make_shared<MemStorage>(image);
  must(must(open_image(storage, spec))->close());
  return storage->image();
}

std::optional<MemImage> with_snapshot(const MemImage& image) {
  char path[] = "/tmp/imgfuse-snapshot-XXXXXX";
  const int fd = ::mkstemp(path);
  REQUIRE(fd >= 0);
  ::close(fd);
  image.save(path);
  const int status = std::system(fmt::format("qemu-img snapshot -c first {} >/dev/null 2>&1", path).c_str());
  std::optional<MemImage> result;
  if (status == 0) result = MemImage::load(path);
  ::unlink(path);
  return result;
}

CheckReport check_image(const MemImage& image) {
  MemStorage storage(image);
  std::string findings;
  const CheckReport report =
      must(must(probe_format(storage))->check(storage, Repair::none, [&](const std::string& finding) {
        if (findings.size() < 2000) findings += finding + "\n";
      }));
  if (report.corruptions > 0 || report.check_errors > 0) MESSAGE("check: " << findings);
  return report;
}

std::vector<std::byte> read_all(Disk& disk, GuestOffset offset, size_t length) {
  std::vector<std::byte> bytes(length);
  must(disk.read(offset, bytes));
  return bytes;
}

}  // namespace imgfuse::test
