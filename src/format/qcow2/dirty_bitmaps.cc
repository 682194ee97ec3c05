#include "format/qcow2/dirty_bitmaps.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <set>

#include "base/buffer.h"
#include "base/log.h"
#include "base/math.h"
#include "format/qcow2/l2_entry.h"
#include "format/qcow2/table_scan.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint64_t kReservedBits = 0xff000000000001fe;  // of a bitmap table entry
constexpr uint64_t kAllOnes = 1;                        // only without an offset
/// Of all bitmaps that record together. 64 TiB at the usual granularity take 128 MiB.
constexpr uint64_t kMaxMemory = uint64_t{128} << 20;
/// Of all tables together, what is read when an image is opened.
constexpr uint64_t kMaxEntries = uint64_t{4} << 20;

constexpr GuestRange kEverything{GuestOffset(0), std::numeric_limits<uint64_t>::max()};

/// The cluster that a table entry names, 0 if none.
Result<uint64_t> cluster_of_entry(const Geometry& g, const BitmapEntry& bitmap, uint64_t index, uint64_t raw) {
  const uint64_t host = raw & kOffsetMask;
  if ((raw & kReservedBits) || (host != 0 && (raw & kAllOnes)) || host % g.cluster_size != 0)
    return fail(ErrorCode::corrupt, "entry {} of the bitmap table at {:#x} is not valid: {:#018x}", index,
                bitmap.table.begin.bytes(), raw);
  return host >> g.cluster_bits;
}

/// Adds the granules that are set in `bits`, of which the first is number `first`, to `ranges`; cut to `limits`.
void append_set(ConstBytes bits, uint64_t first, unsigned granularity_bits, GuestRange limits,
                std::vector<GuestRange>& ranges) {
  for (uint64_t i = 0; i < bits.size() * 8; ++i) {
    if (i % 8 == 0 && bits[i / 8] == std::byte{0}) {
      i += 7;
      continue;
    }
    if ((bits[i / 8] >> i % 8 & std::byte{1}) == std::byte{0}) continue;
    const uint64_t begin = std::max((first + i) << granularity_bits, limits.begin.bytes());
    const uint64_t end = std::min((first + i + 1) << granularity_bits, limits.end().bytes());
    if (begin >= end) continue;
    if (!ranges.empty() && ranges.back().end().bytes() == begin) {
      ranges.back().length += end - begin;
    } else {
      ranges.push_back({GuestOffset(begin), end - begin});
    }
  }
}

}  // namespace

// ---- Opening

Result<> DirtyBitmaps::load(const Header& header) {
  Lock lock(mutex_);
  size_ = header.size;
  Result<std::optional<BitmapDirectory>> directory = read_bitmap_directory(image_.storage, header);
  if (directory && !*directory) return {};
  const Result<> adopted = directory ? adopt(header, std::move(**directory)) : fail(directory.error());
  if (adopted) {
    stored_ = true;
    collect_recording();
    return {};
  }
  if (adopted.error().code() != ErrorCode::corrupt) return adopted;
  log_warning("{}: its dirty bitmaps cannot be used: {}", image_.storage.info().name, adopted.error().text());
  bitmaps_.clear();
  directory_ = {};
  stored_count_ = 0;
  return {};
}

Result<> DirtyBitmaps::adopt(const Header& header, BitmapDirectory directory) {
  directory_ = directory.range;
  stored_count_ = directory.bitmaps.size();
  std::set<std::string> names;
  for (BitmapEntry& entry : directory.bitmaps) {
    if (entry.name.empty() || entry.name.size() > kMaxBitmapName || !names.insert(entry.name).second)
      return fail(ErrorCode::corrupt, "bitmap {} has no name of its own", bitmaps_.size());
    Bitmap bitmap;
    bitmap.lost = !check_bitmap(header, entry);
    bitmap.entry = std::move(entry);
    bitmaps_.push_back(std::move(bitmap));
  }
  if (read_only_) return {};
  IMG_TRY(claim_clusters());
  for (Bitmap& bitmap : bitmaps_) {
    if (!bitmap.recording()) continue;
    Result<> loaded = check_fits(size_, bitmap.entry.granularity_bits);
    if (loaded) loaded = load_bits(bitmap);
    if (!loaded) lose(bitmap, loaded.error());
  }
  return {};
}

/// Each cluster of bitmaps serves one purpose; from here on nothing else is allocated there, or found there.
Result<> DirtyBitmaps::claim_clusters() {
  const Geometry& g = image_.geometry;
  IMG_LET(const uint64_t file_size, image_.storage.size());
  const uint64_t file_clusters = g.clusters_for(file_size);
  if (directory_.begin.bytes() >= file_size || g.clusters_for(directory_.end().bytes()) > file_clusters)
    return fail(ErrorCode::corrupt, "the bitmap directory at {:#x} lies past the end of the file ({:#x})",
                directory_.begin.bytes(), file_size);
  std::vector<uint64_t> all;
  for (uint64_t i = 0; i < g.clusters_for(directory_.length); ++i) all.push_back(g.cluster_of(directory_.begin) + i);
  uint64_t entries = 0;
  for (Bitmap& bitmap : bitmaps_) {
    entries += bitmap.entry.table.length / 8;
    if (entries > kMaxEntries)
      return fail(ErrorCode::corrupt, "the bitmap tables have more than {} entries", kMaxEntries);
    IMG_TRY(find_clusters(bitmap, file_clusters));
    all.insert(all.end(), bitmap.clusters.begin(), bitmap.clusters.end());
  }
  std::sort(all.begin(), all.end());
  ExclusiveLock lock(image_.mutex);
  auto wrong = std::adjacent_find(all.begin(), all.end());
  if (wrong == all.end())
    wrong = std::find_if(all.begin(), all.end(),
                         [&](uint64_t cluster) REQUIRES(image_.mutex) { return image_.known.overlaps(cluster); });
  if (wrong != all.end())
    return fail(ErrorCode::corrupt, "cluster {:#x} belongs to a bitmap and to something else", *wrong);
  image_.known.add_all(all);
  return {};
}

Result<> DirtyBitmaps::find_clusters(Bitmap& bitmap, uint64_t file_clusters) const {
  const Geometry& g = image_.geometry;
  const HostRange table = bitmap.entry.table;
  const uint64_t first = g.cluster_of(table.begin);
  const uint64_t count = g.clusters_for(table.length);
  if (first >= file_clusters || count > file_clusters - first)
    return fail(ErrorCode::corrupt, "the bitmap table at {:#x} lies past the end of the file", table.begin.bytes());
  for (uint64_t i = 0; i < count; ++i) bitmap.clusters.push_back(first + i);
  return scan_table(image_.storage, table, [&](uint64_t index, Entries entries) -> Result<> {
    for (const uint64_t raw : entries) {
      IMG_LET(const uint64_t cluster, cluster_of_entry(g, bitmap.entry, index++, raw));
      if (cluster >= file_clusters)
        return fail(ErrorCode::corrupt, "the bitmap table at {:#x} points past the end of the file, at {:#x}",
                    table.begin.bytes(), cluster << g.cluster_bits);
      if (cluster != 0) bitmap.clusters.push_back(cluster);
    }
    return {};
  });
}

/// The bits that one entry of the table stands for.
Result<> DirtyBitmaps::read_piece(const Bitmap& bitmap, uint64_t index, Bytes out) const {
  const Geometry& g = image_.geometry;
  if (bitmap.bits) {
    bitmap.bits->save(index * g.cluster_size, out);
    return {};
  }
  be<uint64_t> raw;
  IMG_TRY(image_.storage.read(bitmap.entry.table.begin + index * 8, std::as_writable_bytes(std::span(&raw, 1))));
  IMG_LET(const uint64_t cluster, cluster_of_entry(g, bitmap.entry, index, raw));
  if (cluster != 0) return image_.storage.read(g.host_of(cluster), out);
  std::fill(out.begin(), out.end(), raw == kAllOnes ? std::byte{0xff} : std::byte{0});
  return {};
}

Result<> DirtyBitmaps::load_bits(Bitmap& bitmap) const {
  const Geometry& g = image_.geometry;
  auto bits = std::make_unique<BitmapBits>(size_, bitmap.entry.granularity_bits);
  Buffer piece(g.cluster_size);
  for (uint64_t index = 0; index < bitmap.entry.table.length / 8; ++index) {
    IMG_TRY(read_piece(bitmap, index, piece.bytes()));
    bits->merge(index * g.cluster_size, piece.bytes());
  }
  bitmap.bits = std::move(bits);
  return {};
}

void DirtyBitmaps::lose(Bitmap& bitmap, const Error& why) {
  log_warning("{}: dirty bitmap {:?} cannot be kept: {}", image_.storage.info().name, bitmap.entry.name, why.text());
  bitmap.lost = true;
  bitmap.saved = true;
  bitmap.bits.reset();
}

void DirtyBitmaps::collect_recording() {
  recording_.clear();
  if (read_only_) return;
  for (const Bitmap& bitmap : bitmaps_)
    if (bitmap.recording()) recording_.push_back(bitmap.bits.get());
}

// ---- Asked from outside

std::vector<BitmapInfo> DirtyBitmaps::list() const {
  Lock lock(mutex_);
  std::vector<BitmapInfo> infos;
  for (const Bitmap& bitmap : bitmaps_)
    infos.push_back({.name = bitmap.entry.name,
                     .granularity = bitmap.entry.granularity(),
                     .in_use = bitmap.lost,
                     .recording = (bitmap.entry.flags & kBitmapAuto) != 0});
  return infos;
}

Result<size_t> DirtyBitmaps::find(const std::string& name) const {
  const auto at =
      std::find_if(bitmaps_.begin(), bitmaps_.end(), [&](const Bitmap& bitmap) { return bitmap.entry.name == name; });
  if (at == bitmaps_.end()) return fail(ErrorCode::not_found, "there is no bitmap {:?}", name);
  return static_cast<size_t>(at - bitmaps_.begin());
}

Result<> DirtyBitmaps::check_change() const {
  if (read_only_) return fail(ErrorCode::read_only, "{} is open read-only", image_.storage.info().name);
  return latch_.check();
}

/// QEMU's limit, and ours on memory.
Result<> DirtyBitmaps::check_fits(uint64_t size, unsigned granularity_bits) const {
  if (size == 0) return fail(ErrorCode::invalid, "a disk of 0 bytes has no bitmaps");
  if (divide_up(size, uint64_t{1} << granularity_bits) > kMaxBitmapBytes)
    return fail(ErrorCode::invalid, "a disk of {} bytes needs a larger granularity than {}", size,
                uint64_t{1} << granularity_bits);
  uint64_t memory = BitmapBits::memory_for(size, granularity_bits);
  for (const Bitmap& bitmap : bitmaps_)
    if (bitmap.bits) memory += bitmap.bits->bytes();
  if (memory > kMaxMemory)
    return fail(ErrorCode::invalid, "the bitmaps would take more than {} bytes of memory; a larger granularity helps",
                kMaxMemory);
  return {};
}

Result<> DirtyBitmaps::check_new(const std::string& name, uint64_t granularity) const {
  if (image_.geometry.version < 3)
    return fail(ErrorCode::unsupported, "a version 2 image (compat 0.10) has no bitmaps");
  if (name.empty() || name.size() > kMaxBitmapName)
    return fail(ErrorCode::invalid, "a bitmap's name has between 1 and {} bytes, not {}", kMaxBitmapName, name.size());
  if (std::any_of(name.begin(), name.end(), [](char c) { return static_cast<unsigned char>(c) < ' '; }))
    return fail(ErrorCode::invalid, "the bitmap name {:?} has control characters", name);
  if (!is_power_of_two(granularity) || granularity >> kMinGranularityBits == 0 ||
      granularity >> kMaxGranularityBits > 1)
    return fail(ErrorCode::invalid, "granularity {} is not a power of two between 512 and 2 GiB", granularity);
  if (find(name)) return fail(ErrorCode::invalid, "there is a bitmap {:?} already", name);
  uint64_t directory_bytes = BitmapEntry{.name = name}.stored_bytes();
  for (const Bitmap& bitmap : bitmaps_) directory_bytes += bitmap.entry.stored_bytes();
  if (bitmaps_.size() >= kMaxBitmaps || directory_bytes > kMaxBitmapDirectoryBytes)
    return fail(ErrorCode::invalid, "the image has {} bitmaps and takes no more", bitmaps_.size());
  return check_fits(size_, static_cast<unsigned>(std::countr_zero(granularity)));
}

bool DirtyBitmaps::stop_watching() {
  Lock lock(mutex_);
  if (recording_.empty()) watching_ = false;
  return !watching_;
}

Result<> DirtyBitmaps::add(const std::string& name, uint64_t granularity) {
  IMG_TRY(check_change());
  const auto lease = ranges_.exclusive(kEverything);
  Lock lock(mutex_);
  if (!watching_)
    return fail(ErrorCode::unsupported,
                "the kernel writes the data file of {} by itself: for bitmaps, mount it without -o passthrough",
                image_.storage.info().name);
  IMG_TRY(check_new(name, granularity));
  Bitmap bitmap;
  bitmap.entry.name = name;
  bitmap.entry.flags = kBitmapAuto;
  bitmap.entry.granularity_bits = static_cast<uint8_t>(std::countr_zero(granularity));
  bitmap.saved = false;
  bitmap.bits = std::make_unique<BitmapBits>(size_, bitmap.entry.granularity_bits);
  bitmaps_.push_back(std::move(bitmap));
  collect_recording();
  return {};
}

Result<> DirtyBitmaps::remove(const std::string& name) {
  IMG_TRY(check_change());
  const auto lease = ranges_.exclusive(kEverything);
  Lock lock(mutex_);
  IMG_LET(const size_t index, find(name));
  const Bitmap& bitmap = bitmaps_[index];
  removed_.insert(removed_.end(), bitmap.clusters.begin(), bitmap.clusters.end());
  any_removed_ |= !bitmap.entry.table.empty() || bitmap.lost;
  bitmaps_.erase(bitmaps_.begin() + static_cast<ptrdiff_t>(index));
  collect_recording();
  return {};
}

Result<> DirtyBitmaps::assign(const std::string& name, const std::vector<GuestRange>& changed) {
  IMG_TRY(check_change());
  const auto lease = ranges_.exclusive(kEverything);
  Lock lock(mutex_);
  IMG_LET(const size_t index, find(name));
  Bitmap& bitmap = bitmaps_[index];
  if (bitmap.lost)
    return fail(ErrorCode::invalid, "bitmap {:?} is in use or inconsistent; it can only be removed", name);
  if (!bitmap.bits) IMG_TRY(check_fits(size_, bitmap.entry.granularity_bits));
  bitmap.bits = std::make_unique<BitmapBits>(size_, bitmap.entry.granularity_bits);
  for (const GuestRange range : changed) bitmap.bits->set(range);
  bitmap.saved = false;
  collect_recording();
  return {};
}

Result<std::vector<GuestRange>> DirtyBitmaps::changed(const std::string& name, GuestRange range) const {
  const Geometry& g = image_.geometry;
  Lock lock(mutex_);
  IMG_LET(const size_t at, find(name));
  const Bitmap& bitmap = bitmaps_[at];
  if (bitmap.lost)
    return fail(ErrorCode::invalid, "bitmap {:?} is in use or inconsistent: what changed is not known", name);
  std::vector<GuestRange> ranges;
  if (range.begin.bytes() >= size_) return ranges;
  range.length = std::min(range.length, size_ - range.begin.bytes());
  if (range.empty()) return ranges;
  const unsigned granularity_bits = bitmap.entry.granularity_bits;
  const uint64_t per_piece = g.cluster_size * 8;
  const uint64_t last = ((range.end().bytes() - 1) >> granularity_bits) / per_piece;
  Buffer piece(g.cluster_size);
  for (uint64_t index = (range.begin.bytes() >> granularity_bits) / per_piece; index <= last; ++index) {
    IMG_TRY(read_piece(bitmap, index, piece.bytes()));
    append_set(piece.bytes(), index * per_piece, granularity_bits, range, ranges);
  }
  return ranges;
}

// ---- Other sizes

void DirtyBitmaps::resize(uint64_t size) {
  Lock lock(mutex_);
  if (size == size_) return;
  for (Bitmap& bitmap : bitmaps_) {
    if (bitmap.lost) continue;
    if (Result<> resized = resize_bits(bitmap, size); !resized) lose(bitmap, resized.error());
  }
  std::erase_if(bitmaps_, [](const Bitmap& bitmap) { return bitmap.lost && bitmap.entry.table.empty(); });
  size_ = size;
  collect_recording();
}

Result<> DirtyBitmaps::resize_bits(Bitmap& bitmap, uint64_t size) {
  const unsigned granularity_bits = bitmap.entry.granularity_bits;
  IMG_TRY(check_fits(size, granularity_bits));
  if (!bitmap.bits) IMG_TRY(load_bits(bitmap));
  auto bits = std::make_unique<BitmapBits>(size, granularity_bits);
  Buffer piece(size_t{64} << 10);
  for (uint64_t at = 0; at < std::min(bits->bytes(), bitmap.bits->bytes()); at += piece.size()) {
    bitmap.bits->save(at, piece.bytes());
    bits->merge(at, piece.bytes());
  }
  if (size > size_) bits->set({GuestOffset(size_), size - size_});
  bitmap.bits = std::move(bits);
  bitmap.saved = false;
  return {};
}

}  // namespace imgfuse::qcow2
