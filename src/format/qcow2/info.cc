#include "format/qcow2/bitmap_directory.h"
#include "format/qcow2/header.h"
#include "format/qcow2/qcow2.h"
#include "format/qcow2/snapshot_table.h"

namespace imgfuse::qcow2 {

namespace {

/// A directory that makes no sense is a matter for a check, not for this.
std::vector<BitmapInfo> bitmaps_of(Storage& storage, const Header& header) {
  std::vector<BitmapInfo> bitmaps;
  const auto directory = read_bitmap_directory(storage, header);
  if (!directory || !*directory) return bitmaps;
  for (const BitmapEntry& bitmap : (*directory)->bitmaps)
    bitmaps.push_back({.name = bitmap.name,
                       .granularity = bitmap.granularity(),
                       .in_use = (bitmap.flags & kBitmapInUse) != 0,
                       .recording = (bitmap.flags & kBitmapAuto) != 0});
  return bitmaps;
}

}  // namespace

Result<ImageInfo> info(Storage& storage) {
  IMG_LET(Header header, read_header(storage, Purpose::info));
  IMG_LET(SnapshotTable table, read_snapshot_table(storage, header));

  Qcow2Info own;
  own.compat = header.version == 2 ? "0.10" : "1.1";
  own.compression_type = header.compression == Compression::zstd ? "zstd" : "zlib";
  own.refcount_bits = 1u << header.refcount_order;
  own.lazy_refcounts = (header.compatible & kLazyRefcounts) != 0;
  own.corrupt = (header.incompatible & kCorrupt) != 0;
  own.extended_l2 = (header.incompatible & kExtendedL2) != 0;
  own.has_data_file = header.has_data_file();
  if (own.has_data_file) own.data_file = std::move(header.data_file);
  own.data_file_raw = own.has_data_file && (header.autoclear & kRawDataFile) != 0;

  own.bitmaps = bitmaps_of(storage, header);

  ImageInfo image;
  image.format = "qcow2";
  image.virtual_size = header.size;
  image.cluster_size = static_cast<uint32_t>(header.cluster_size());
  image.dirty = (header.incompatible & kDirty) != 0;
  image.encrypted = header.crypt_method != 0;
  image.backing_filename = std::move(header.backing_name);
  image.backing_format = std::move(header.backing_format);
  for (Snapshot& snapshot : table.snapshots) image.snapshots.push_back(std::move(snapshot.info));
  image.qcow2 = std::move(own);
  return image;
}

}  // namespace imgfuse::qcow2
