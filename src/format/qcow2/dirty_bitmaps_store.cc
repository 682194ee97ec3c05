// How bitmaps come back to disk. Their clusters are never written in place: new ones are, and the header switches.
#include <algorithm>

#include "base/buffer.h"
#include "base/log.h"
#include "format/qcow2/dirty_bitmaps.h"
#include "format/qcow2/header_update.h"
#include "format/qcow2/layout.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint64_t kPiece = uint64_t{1} << 20;

/// Writes into new clusters, which are free again unless commit() is called.
class ClusterWriter {
 public:
  ClusterWriter(Image& image, Allocator& allocator) : image_(image), allocator_(allocator) {}

  /// A table and the clusters with the bits that are set.
  Result<HostRange> write_bitmap(const BitmapBits& bits);
  /// Bytes in contiguous clusters.
  Result<HostRange> write(const std::vector<std::byte>& bytes);
  void commit() {
    for (Reservation& reservation : taken_) reservation.commit();
  }

 private:
  Result<> write_pieces(const BitmapBits& bits, const std::vector<uint64_t>& pieces, std::vector<be<uint64_t>>& table);

  Image& image_;
  Allocator& allocator_;
  std::vector<Reservation> taken_;
};

Result<HostRange> ClusterWriter::write_bitmap(const BitmapBits& bits) {
  const Geometry& g = image_.geometry;
  std::vector<be<uint64_t>> table(g.clusters_for(bits.bytes()));
  std::vector<uint64_t> pieces;  // with a bit in them
  Buffer piece(g.cluster_size);
  for (uint64_t index = 0; index < table.size(); ++index) {
    bits.save(index * g.cluster_size, piece.bytes());
    if (!is_zero(piece.bytes())) pieces.push_back(index);
  }
  IMG_TRY(write_pieces(bits, pieces, table));
  const auto bytes = std::as_bytes(std::span(table));
  return write({bytes.begin(), bytes.end()});
}

Result<> ClusterWriter::write_pieces(const BitmapBits& bits, const std::vector<uint64_t>& pieces,
                                     std::vector<be<uint64_t>>& table) {
  const Geometry& g = image_.geometry;
  Buffer buffer(std::max(kPiece, g.cluster_size));
  for (size_t done = 0; done < pieces.size();) {
    IMG_LET(Reservation run, allocator_.reserve(std::min(pieces.size() - done, buffer.size() / g.cluster_size)));
    for (uint64_t i = 0; i < run.clusters(); ++i) {
      const uint64_t index = pieces[done + i];
      bits.save(index * g.cluster_size, buffer.bytes().subspan(i * g.cluster_size, g.cluster_size));
      table[index] = (run.host() + i * g.cluster_size).bytes();
    }
    IMG_TRY(image_.storage.write(run.host(), buffer.bytes().first(run.clusters() * g.cluster_size)));
    done += run.clusters();
    taken_.push_back(std::move(run));
  }
  return {};
}

Result<HostRange> ClusterWriter::write(const std::vector<std::byte>& bytes) {
  const Geometry& g = image_.geometry;
  const uint64_t count = g.clusters_for(bytes.size());
  HostOffset host;
  if (count == 1) {
    IMG_LET(Reservation one, allocator_.reserve(1));
    host = one.host();
    taken_.push_back(std::move(one));
  } else {
    IMG_LET(std::vector<Reservation> run, allocator_.reserve_contiguous(count));
    host = run.front().host();
    std::move(run.begin(), run.end(), std::back_inserter(taken_));
  }
  std::vector<std::byte> whole = bytes;
  whole.resize(count * g.cluster_size);
  IMG_TRY(image_.storage.write(host, whole));
  return HostRange{host, bytes.size()};
}

}  // namespace

/// One write in place that changes flags only. It may be torn between sectors: until everything else is durable all of
/// the bitmaps are valid, whatever their flags say.
Result<> DirtyBitmaps::write_flags(bool in_use) {
  std::vector<BitmapEntry> entries;
  for (const Bitmap& bitmap : bitmaps_) {
    entries.push_back(bitmap.entry);
    uint32_t& flags = entries.back().flags;
    flags = in_use || bitmap.lost ? flags | kBitmapInUse : flags & ~kBitmapInUse;
  }
  IMG_TRY(image_.storage.write(directory_.begin, encode_bitmap_directory(entries)));
  return image_.storage.flush();
}

Result<> DirtyBitmaps::mark_in_use() {
  Lock lock(mutex_);
  return stored_ ? write_flags(true) : Result<>{};
}

bool DirtyBitmaps::unchanged() const {
  return !any_removed_ && bitmaps_.size() == stored_count_ &&
         std::none_of(bitmaps_.begin(), bitmaps_.end(), [](const Bitmap& bitmap) { return bitmap.must_be_saved(); });
}

Result<> DirtyBitmaps::store(Flusher& flusher) {
  Lock lock(mutex_);
  if (!stored_ && bitmaps_.empty()) return {};
  Result<> stored = unchanged() ? write_flags(false) : store_anew(flusher);
  if (stored || stored.error().code() != ErrorCode::no_space) return stored;
  log_warning("{}: there is no space to store its dirty bitmaps, which are lost: {}", image_.storage.info().name,
              stored.error().text());
  return {};
}

/// New clusters and their counts durable, then the header switches to them, then the old ones are freed.
Result<> DirtyBitmaps::store_anew(Flusher& flusher) {
  const Geometry& g = image_.geometry;
  ClusterWriter writer(image_, allocator_);
  std::vector<BitmapEntry> entries;
  std::vector<uint64_t> replaced = removed_;
  for (uint64_t i = 0; i < g.clusters_for(directory_.length); ++i)
    replaced.push_back(g.cluster_of(directory_.begin) + i);
  for (const Bitmap& bitmap : bitmaps_) {
    BitmapEntry entry = bitmap.entry;
    entry.flags = bitmap.lost ? entry.flags | kBitmapInUse : entry.flags & ~kBitmapInUse;
    if (bitmap.must_be_saved()) {
      IMG_LET(entry.table, writer.write_bitmap(*bitmap.bits));
      replaced.insert(replaced.end(), bitmap.clusters.begin(), bitmap.clusters.end());
    }
    entries.push_back(std::move(entry));
  }
  HostRange directory;
  if (!entries.empty()) {
    IMG_LET(directory, writer.write(encode_bitmap_directory(entries)));
  }
  IMG_TRY(flusher.flush());
  Result<> switched = switch_header(entries.size(), directory);
  if (!switched) {
    if (switched.error().code() == ErrorCode::no_space) return switched;  // nothing was changed
    latch_.set(switched.error());                                         // either directory may be the durable one
    writer.commit();
    return switched;
  }
  writer.commit();
  free_clusters(std::move(replaced));
  return {};
}

Result<> DirtyBitmaps::switch_header(size_t count, HostRange directory) {
  IMG_LET(Header header, read_header(image_.storage, Purpose::info));
  const auto old = std::find_if(header.extensions.begin(), header.extensions.end(),
                                [](const Extension& extension) { return extension.type == wire::kExtensionBitmaps; });
  if (count == 0) {
    header.autoclear &= ~kBitmaps;  // and with it goes the extension
    return replace_header(image_.storage, header);
  }
  header.autoclear |= kBitmaps;
  if (old != header.extensions.end()) {
    *old = bitmaps_extension(count, directory);
  } else {
    header.extensions.push_back(bitmaps_extension(count, directory));
  }
  return replace_header(image_.storage, header);
}

void DirtyBitmaps::free_clusters(std::vector<uint64_t> clusters) {
  std::sort(clusters.begin(), clusters.end());
  ExclusiveLock lock(image_.mutex);
  for (const uint64_t cluster : clusters) {
    image_.known.remove(cluster);
    allocator_.quarantine(image_.geometry.host_of(cluster), 1, HostSpace::punch);
  }
}

}  // namespace imgfuse::qcow2
