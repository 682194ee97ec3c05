// imgfuse info: what an image is. Never opens what the image names unless asked for the chain.
#include <fmt/format.h>

#include "command_line.h"
#include "control/protocol.h"
#include "imgfuse/check.h"
#include "snapshot_list.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

using control::Json;

Json to_json(const BitmapInfo& bitmap) {
  Json flags = Json::array();
  if (bitmap.in_use) flags.push_back("in-use");
  if (bitmap.recording) flags.push_back("auto");
  return {{"flags", flags}, {"name", bitmap.name}, {"granularity", bitmap.granularity}};
}

Json to_json(const Qcow2Info& qcow2) {
  Json data = {
      {"compat", qcow2.compat}, {"compression-type", qcow2.compression_type}, {"refcount-bits", qcow2.refcount_bits}};
  if (qcow2.compat != "0.10") {
    data["lazy-refcounts"] = qcow2.lazy_refcounts;
    data["corrupt"] = qcow2.corrupt;
    data["extended-l2"] = qcow2.extended_l2;
    if (qcow2.data_file) data["data-file"] = *qcow2.data_file;
    if (qcow2.has_data_file) data["data-file-raw"] = qcow2.data_file_raw;
  }
  for (const BitmapInfo& bitmap : qcow2.bitmaps) data["bitmaps"].push_back(to_json(bitmap));
  return {{"type", "qcow2"}, {"data", data}};
}

Json to_json(const FvdInfo& fvd) {
  Json data = {{"all-data-in-image", fvd.all_data_in_image}, {"compact", fvd.compact},
               {"journal-size", fvd.journal_size},           {"need-zero-init", fvd.need_zero_init},
               {"copy-on-read", fvd.copying.copy_on_read},   {"prefetch-start-delay", fvd.copying.start_delay}};
  if (fvd.block_size > 0) {
    data["block-size"] = fvd.block_size;
    data["base-size"] = fvd.base_size;
  }
  if (fvd.compact) {
    data["chunk-size"] = fvd.chunk_size;
    data["storage-grow-unit"] = fvd.storage_grow_unit;
  }
  if (!fvd.add_storage_command.empty()) data["add-storage-command"] = fvd.add_storage_command;
  if (fvd.data_file) data["data-file"] = *fvd.data_file;
  if (fvd.data_file_format) data["data-file-format"] = *fvd.data_file_format;
  return {{"type", "fvd"}, {"data", data}};
}

/// qemu-img's keys.
Json to_json(const ImageInfo& image) {
  Json json = {{"virtual-size", image.virtual_size}, {"filename", image.filename}, {"format", image.format}};
  if (image.cluster_size) json["cluster-size"] = *image.cluster_size;
  json["actual-size"] = image.actual_size;
  json["dirty-flag"] = image.dirty;
  if (image.encrypted) json["encrypted"] = true;
  if (image.backing_filename) json["backing-filename"] = *image.backing_filename;
  if (image.full_backing_filename) json["full-backing-filename"] = *image.full_backing_filename;
  if (image.backing_format) json["backing-filename-format"] = *image.backing_format;
  for (const SnapshotInfo& snapshot : image.snapshots) json["snapshots"].push_back(control::to_json(snapshot));
  if (image.qcow2) json["format-specific"] = to_json(*image.qcow2);
  if (image.fvd) json["format-specific"] = to_json(*image.fvd);
  return json;
}

void print_qcow2(std::ostream& out, const Qcow2Info& qcow2) {
  out << "Format specific information:\n"
      << fmt::format("    compat: {}\n    compression type: {}\n    refcount bits: {}\n", qcow2.compat,
                     qcow2.compression_type, qcow2.refcount_bits);
  if (qcow2.compat == "0.10") return;
  out << fmt::format("    lazy refcounts: {}\n    corrupt: {}\n    extended l2: {}\n", qcow2.lazy_refcounts,
                     qcow2.corrupt, qcow2.extended_l2);
  if (qcow2.data_file) out << fmt::format("    data file: {}\n", printable(*qcow2.data_file));
  if (qcow2.has_data_file) out << fmt::format("    data file raw: {}\n", qcow2.data_file_raw);
  if (!qcow2.bitmaps.empty()) out << "    bitmaps:\n";
  for (const BitmapInfo& bitmap : qcow2.bitmaps)
    out << fmt::format("        {} (granularity {}{}{})\n", bitmap.name, human_size(bitmap.granularity),
                       bitmap.recording ? ", auto" : "", bitmap.in_use ? ", in use" : "");
}

void print_fvd(std::ostream& out, const FvdInfo& fvd) {
  out << "Format specific information:\n"
      << fmt::format("    compact: {}\n    all data in image: {}\n    journal size: {}\n", fvd.compact,
                     fvd.all_data_in_image, fvd.journal_size);
  if (fvd.compact)
    out << fmt::format("    chunk size: {}\n    storage grow unit: {}\n", fvd.chunk_size, fvd.storage_grow_unit);
  if (fvd.block_size > 0)
    out << fmt::format("    block size: {}\n    base size: {}\n    copy on read: {}\n    prefetch start delay: {}\n",
                       fvd.block_size, fvd.base_size, fvd.copying.copy_on_read, fvd.copying.start_delay);
  if (fvd.need_zero_init) out << "    need zero init: true\n";
  if (!fvd.add_storage_command.empty()) out << "    add storage command: " << fvd.add_storage_command << "\n";
  if (fvd.data_file) out << "    data file: " << *fvd.data_file << "\n";
}

void print(std::ostream& out, const ImageInfo& image) {
  out << fmt::format("image: {}\nfile format: {}\nvirtual size: {} ({} bytes)\ndisk size: {}\n", image.filename,
                     image.format, human_size(image.virtual_size), image.virtual_size, human_size(image.actual_size));
  if (image.encrypted) out << "encrypted: yes\n";
  if (image.cluster_size) out << fmt::format("cluster_size: {}\n", *image.cluster_size);
  if (image.dirty) out << "cleanly shut down: no\n";
  if (image.backing_filename) {
    out << "backing file: " << *image.backing_filename;
    if (image.full_backing_filename && *image.full_backing_filename != *image.backing_filename)
      out << " (actual path: " << *image.full_backing_filename << ")";
    out << "\n";
  }
  if (image.backing_format) out << "backing file format: " << *image.backing_format << "\n";
  if (!image.snapshots.empty()) print_snapshots(out, image.snapshots);
  if (image.qcow2) print_qcow2(out, *image.qcow2);
  if (image.fvd) print_fvd(out, *image.fvd);
}

void print_chain(std::ostream& out, const std::vector<ImageInfo>& images, bool json) {
  if (json) {
    Json array = Json::array();
    for (const ImageInfo& image : images) array.push_back(to_json(image));
    out << control::to_text(array) << "\n";
    return;
  }
  for (size_t i = 0; i < images.size(); ++i) {
    if (i > 0) out << "\n";
    print(out, images[i]);
  }
}

Result<> info(Io& io, const std::string& path, const OpenOptions& options, bool chain, bool json) {
  if (chain) {
    IMG_LET(const auto images, chain_info(path, options));
    print_chain(io.out, images, json);
    return {};
  }
  IMG_LET(const ImageInfo image, image_info(path, options));
  if (json) {
    io.out << control::to_text(to_json(image)) << "\n";
  } else {
    print(io.out, image);
  }
  return {};
}

}  // namespace

int run_info(Io& io, Arguments args) {
  std::string image;
  OpenOptions options{.read_only = true};
  bool chain = false;
  bool json = false;
  CommandLine line("Says what an image is. Opens nothing that the image names, unless asked for the chain.",
                   "imgfuse info");
  line.text("IMAGE", image).required();
  line.flag("--backing-chain", chain, "The image and all its backing files, top first");
  add_open_options(line, options);
  add_json_option(line, json);
  if (const auto status = line.parse(io, args)) return *status;
  if (const auto told = info(io, image, options, chain, json); !told) {
    print_error(io, image, told.error());
    return kFailure;
  }
  io.out << std::flush;
  return kSuccess;
}

}  // namespace imgfuse::tool
