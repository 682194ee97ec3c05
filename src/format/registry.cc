#include "format/registry.h"

#include <algorithm>
#include <array>

#include "format/fvd/fvd.h"
#include "format/magic.h"
#include "format/qcow2/qcow2.h"
#include "format/qed/qed.h"
#include "format/raw/raw.h"

namespace imgfuse {
namespace {

Result<std::unique_ptr<Disk>> open_raw(std::shared_ptr<Storage> storage, FormatOpenParameters parameters) {
  if (parameters.snapshot) return fail(ErrorCode::invalid, "a raw image has no snapshots");
  if (parameters.compress)
    return fail(ErrorCode::unsupported,
                "a raw image has no compressed clusters; copy the disk with imgfuse convert -c -O qcow2");
  return raw::open(std::move(storage), {.read_only = parameters.read_only, .probed = parameters.probed});
}

Result<std::unique_ptr<Disk>> open_qcow2(std::shared_ptr<Storage> storage, FormatOpenParameters parameters) {
  return qcow2::open(std::move(storage), {.read_only = parameters.read_only,
                                          .metadata_cache = parameters.metadata_cache,
                                          .compressed_cache = std::move(parameters.compressed_cache),
                                          .snapshot = std::move(parameters.snapshot),
                                          .compress = std::move(parameters.compress),
                                          .open_backing = std::move(parameters.open_backing),
                                          .open_data_file = std::move(parameters.open_data_file)});
}

Result<std::unique_ptr<Disk>> open_qed(std::shared_ptr<Storage> storage, FormatOpenParameters parameters) {
  if (parameters.snapshot) return fail(ErrorCode::invalid, "a QED image has no snapshots");
  if (parameters.compress)
    return fail(ErrorCode::unsupported,
                "a QED image has no compressed clusters; copy the disk with imgfuse convert -c -O qcow2");
  return qed::open(std::move(storage), {.read_only = parameters.read_only,
                                        .metadata_cache = parameters.metadata_cache,
                                        .open_backing = std::move(parameters.open_backing)});
}

Result<std::unique_ptr<Disk>> open_fvd(std::shared_ptr<Storage> storage, FormatOpenParameters parameters) {
  if (parameters.snapshot) return fail(ErrorCode::invalid, "an FVD image has no snapshots");
  if (parameters.compress)
    return fail(ErrorCode::unsupported,
                "an FVD image has no compressed clusters; copy the disk with imgfuse convert -c -O qcow2");
  return fvd::open(std::move(storage), {.read_only = parameters.read_only,
                                        .open_backing = std::move(parameters.open_backing),
                                        .open_data_file = std::move(parameters.open_data_file),
                                        .open_data_format = std::move(parameters.open_data_format),
                                        .grow_device = std::move(parameters.grow_device),
                                        .keeps_base = parameters.keeps_backing});
}

/// Most formats do not look at the backing disk.
template <auto kCreate>
Result<> create_alone(Storage& storage, const CreateOptions& options, Disk*) {
  return kCreate(storage, options);
}

Result<> amend_fvd(std::shared_ptr<Storage> storage, const AmendOptions& options, BackingOpener) {
  return fvd::amend(*storage, options);
}

Result<CheckReport> check_raw(Storage&, Repair, const CheckSink&) {
  return fail(ErrorCode::unsupported, "a raw image has nothing that could be checked");
}

Result<> amend_raw(std::shared_ptr<Storage>, const AmendOptions&, BackingOpener) {
  return fail(ErrorCode::unsupported, "a raw image has no options to change");
}

Result<> change_backing_of_raw(Storage&, const std::string&, const std::optional<std::string>&) {
  return fail(ErrorCode::unsupported, "a raw image has no backing file");
}

constexpr std::array kFormats = {
    Format{"raw", open_raw, raw::check_create_options, create_alone<raw::create>, check_raw, raw::info, amend_raw,
           change_backing_of_raw},
    Format{"qcow2", open_qcow2, qcow2::check_create_options, create_alone<qcow2::create>, qcow2::check, qcow2::info,
           qcow2::amend, qcow2::change_backing},
    Format{"qed", open_qed, qed::check_create_options, create_alone<qed::create>, qed::check, qed::info, qed::amend,
           qed::change_backing, true},
    Format{"fvd", open_fvd, fvd::check_create_options, fvd::create, fvd::check, fvd::info, amend_fvd,
           fvd::change_backing},
};

constexpr std::array<std::string_view, 12> kForeignFormats = {"qcow", "vmdk",      "vhdx",  "vpc",   "vhd", "vdi",
                                                              "luks", "parallels", "bochs", "cloop", "dmg", "vvfat"};

const Format* find(std::string_view name) {
  for (const Format& format : kFormats)
    if (format.name == name) return &format;
  return nullptr;
}

}  // namespace

Result<const Format*> format_by_name(std::string_view name) {
  if (const Format* format = find(name)) return format;
  if (std::find(kForeignFormats.begin(), kForeignFormats.end(), name) != kForeignFormats.end())
    return fail(ErrorCode::unsupported, "format {} is not implemented; raw, qcow2, qed and fvd are", name);
  return fail(ErrorCode::invalid, "format {:?} is not known; raw, qcow2, qed and fvd are", name);
}

Result<const Format*> probe_format(Storage& storage) {
  std::array<std::byte, kMagicBytes> first;
  IMG_TRY(storage.read(HostOffset(0), first));
  const std::optional<std::string_view> name = magic_format(first);
  if (!name) return find("raw");
  if (const Format* format = find(*name)) return format;
  return fail(ErrorCode::unsupported,
              "it looks like a {0} image, which is not implemented; to treat it as a raw disk, add --format raw",
              *name);
}

}  // namespace imgfuse
