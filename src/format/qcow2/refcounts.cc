#include "format/qcow2/refcounts.h"

#include <cstring>

#include "base/buffer.h"
#include "base/endian.h"
#include "format/qcow2/l2_entry.h"
#include "format/qcow2/refcount_width.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint64_t kMaxTableBytes = 8 << 20;
// Small clusters need a block for every few KiB of file: make as many at once as cover this, for one host flush.
constexpr uint64_t kBlocksAheadBytes = 4 << 20;
constexpr uint64_t kEntriesPerSector = 512 / 8;  // a sector is the largest unit that a crash does not tear

template <class T>
uint64_t get_wide(const std::byte* at) {
  be<T> value;
  std::memcpy(&value, at, sizeof value);
  return T{value};
}

template <class T>
void set_wide(std::byte* at, uint64_t value) {
  const be<T> stored(static_cast<T>(value));
  std::memcpy(at, &stored, sizeof stored);
}

std::vector<be<uint64_t>> to_disk(const std::vector<uint64_t>& entries) { return {entries.begin(), entries.end()}; }

template <class T>
ConstBytes bytes_of(const std::vector<T>& entries) {
  return std::as_bytes(std::span(entries));
}

}  // namespace

uint64_t get_refcount(ConstBytes block, uint64_t index, uint32_t bits) {
  switch (bits) {
    case 64:
      return get_wide<uint64_t>(&block[index * 8]);
    case 32:
      return get_wide<uint32_t>(&block[index * 4]);
    case 16:
      return get_wide<uint16_t>(&block[index * 2]);
    case 8:
      return get_wide<uint8_t>(&block[index]);
    default: {
      const uint64_t per_byte = 8 / bits;
      const unsigned shift = static_cast<unsigned>(bits * (index % per_byte));
      return std::to_integer<uint64_t>(block[index / per_byte]) >> shift & ((1u << bits) - 1);
    }
  }
}

void set_refcount(Bytes block, uint64_t index, uint32_t bits, uint64_t value) {
  switch (bits) {
    case 64:
      return set_wide<uint64_t>(&block[index * 8], value);
    case 32:
      return set_wide<uint32_t>(&block[index * 4], value);
    case 16:
      return set_wide<uint16_t>(&block[index * 2], value);
    case 8:
      return set_wide<uint8_t>(&block[index], value);
    default: {
      const uint64_t per_byte = 8 / bits;
      const unsigned shift = static_cast<unsigned>(bits * (index % per_byte));
      std::byte& byte = block[index / per_byte];
      const auto mask = static_cast<std::byte>(((1u << bits) - 1) << shift);
      byte = (byte & ~mask) | (static_cast<std::byte>(value << shift) & mask);
    }
  }
}

Result<> Refcounts::load(const Header& header) {
  table_offset_ = header.refcount_table_offset;
  table_clusters_ = header.refcount_table_clusters;
  std::vector<be<uint64_t>> stored(table_clusters_ * image_.geometry.cluster_size / 8);
  IMG_TRY(image_.storage.read(table_offset_, std::as_writable_bytes(std::span(stored))));
  ExclusiveLock lock(image_.mutex);
  table_.assign(stored.begin(), stored.end());
  std::vector<uint64_t> known;
  for (uint64_t entry : table_)
    if (HostOffset block(entry & kRefcountTableMask); block.bytes() != 0)
      known.push_back(image_.geometry.cluster_of(block));
  const bool table_overlaps = !image_.known.add(image_.geometry.cluster_of(table_offset_), table_clusters_);
  if (uint64_t twice = image_.known.add_all(known); twice != 0 || table_overlaps)
    return fail(ErrorCode::corrupt,
                "the refcount table at {:#x} overlaps other metadata or names the block at {:#x} twice; repair it with "
                "imgfuse check --repair all",
                table_offset_.bytes(), twice * image_.geometry.cluster_size);
  return {};
}

HostOffset Refcounts::block_at(uint64_t index) const {
  return HostOffset(index < table_.size() ? table_[index] & kRefcountTableMask : 0);
}

Result<Refcounts::Slice> Refcounts::slice_of(uint64_t cluster, TableCache::Room room) {
  const Geometry& g = image_.geometry;
  const uint64_t index = cluster / g.refcounts_per_block;
  const uint64_t per_slice = g.slice_bytes * 8 / g.refcount_bits;
  Slice slice{{}, round_down(cluster, per_slice), per_slice};
  HostOffset block;
  {
    SharedLock lock(image_.mutex);
    block = block_at(index);
  }
  if (block.bytes() == 0) return slice;
  if (block.bytes() % g.cluster_size != 0 || block.bytes() >= kMaxHostOffset)
    return fail(ErrorCode::corrupt, "refcount table entry {} points at {:#x}, which is not a cluster of {} bytes",
                index, block.bytes(), g.cluster_size);
  const uint64_t within = cluster % g.refcounts_per_block / per_slice * g.slice_bytes;
  IMG_LET(slice.pin, image_.tables.pin(block + within, room));
  return slice;
}

uint64_t Refcounts::get(const Slice& slice, uint64_t cluster) const {
  if (!slice.pin) return 0;
  return get_refcount(slice.pin.content(), cluster - slice.first, image_.geometry.refcount_bits);
}

uint64_t Refcounts::first_free(const Slice& slice, uint64_t cluster) const {
  uint64_t index = cluster - slice.first;
  const ConstBytes counts = slice.pin.content();
  with_refcount_width(image_.geometry.refcount_bits, [&](auto width) {
    while (index < slice.count && width.get(counts, index) != 0) ++index;
  });
  return slice.first + index;
}

void Refcounts::set(const Slice& slice, uint64_t cluster, uint64_t value) NO_THREAD_SAFETY_ANALYSIS {
  if (value > get(slice, cluster)) image_.counts_first = true;
  put(slice, cluster, value);
}

void Refcounts::put(const Slice& slice, uint64_t cluster, uint64_t value) {
  const uint32_t bits = image_.geometry.refcount_bits;
  const uint64_t index = cluster - slice.first;
  const Bytes counts = image_.tables.edit(slice.pin, kCountStage, index * bits / 8, divide_up(bits, 8));
  set_refcount(counts, index, bits, value);
}

uint64_t Refcounts::blocks_at_once() const {
  const Geometry& g = image_.geometry;
  return std::clamp<uint64_t>(kBlocksAheadBytes / (g.refcounts_per_block * g.cluster_size), 1,
                              std::max<uint64_t>(1, g.refcounts_per_block / 2));
}

uint64_t Refcounts::longest_run() const { return blocks_at_once() * (image_.geometry.refcounts_per_block - 1); }

Result<uint64_t> Refcounts::create_block(uint64_t cluster) {
  const Geometry& g = image_.geometry;
  const uint64_t index = cluster / g.refcounts_per_block;
  const uint64_t wanted = blocks_at_once();
  uint64_t count = 0;
  {
    SharedLock lock(image_.mutex);
    // Entries of one sector only: the first block counts them all, so none may become durable without it (I6).
    const uint64_t end = std::min<uint64_t>(table_.size(), round_down(index, kEntriesPerSector) + kEntriesPerSector);
    while (count < wanted && index + count < end && block_at(index + count).bytes() == 0) ++count;
  }
  return count == 0 ? grow_table(index, 0) : create_blocks_in_table(index, count);
}

Result<uint64_t> Refcounts::make_room(uint64_t cluster, uint64_t clusters, uint64_t limit) {
  const uint64_t per_block = image_.geometry.refcounts_per_block;
  const uint64_t blocks = divide_up(clusters, per_block - 1);  // each takes a cluster
  uint64_t index = divide_up(cluster, per_block);
  bool fits = false;
  {
    SharedLock lock(image_.mutex);
    for (uint64_t i = index; i < table_.size(); ++i)
      if (block_at(i).bytes() != 0) index = i + 1;
    fits = index + blocks <= table_.size();
  }
  if (index * per_block + blocks + clusters > limit)
    return fail(ErrorCode::no_space, "there is no room for a table of {} clusters behind the others", clusters);
  return fits ? create_blocks_in_table(index, blocks) : grow_table(index, clusters);
}

/// Writes the blocks for the regions [index, index + count) into the first clusters of region `index`, where the first
/// `used_clusters` clusters count as used: the blocks describe themselves. Durable when it returns (I6).
Result<> Refcounts::write_blocks(uint64_t index, uint64_t count, uint64_t used_clusters) {
  const Geometry& g = image_.geometry;
  const uint64_t first = index * g.refcounts_per_block;
  if ((first + used_clusters) > (kMaxHostOffset >> g.cluster_bits))
    return fail(ErrorCode::no_space, "the image has reached the largest file size of the format");
  Buffer blocks = Buffer::zeroed(count * g.cluster_size);
  for (uint64_t i = 0; i < used_clusters; ++i)
    set_refcount(blocks.bytes().subspan(i / g.refcounts_per_block * g.cluster_size, g.cluster_size),
                 i % g.refcounts_per_block, g.refcount_bits, 1);
  image_.tables.drop({g.host_of(first), count * g.cluster_size});
  return image_.storage.write(g.host_of(first), blocks.bytes());
}

Result<uint64_t> Refcounts::create_blocks_in_table(uint64_t index, uint64_t count) {
  const Geometry& g = image_.geometry;
  const uint64_t first = index * g.refcounts_per_block;
  {
    SharedLock lock(image_.mutex);
    if (image_.known.overlaps(first, count))
      return fail(ErrorCode::corrupt, "cluster {:#x} holds metadata but has no reference count",
                  first * g.cluster_size);
  }
  IMG_TRY(write_blocks(index, count, count));
  IMG_TRY(image_.storage.flush());

  std::vector<be<uint64_t>> entries;
  for (uint64_t i = 0; i < count; ++i) entries.emplace_back(g.host_of(first + i).bytes());
  IMG_TRY(write_entries(index, entries));

  ExclusiveLock lock(image_.mutex);
  for (uint64_t i = 0; i < count; ++i) table_[index + i] = entries[i];
  image_.known.add(first, count);
  return first + count;
}

/// The blocks lie one behind the other, so the first ones count them all: no entry may become durable before the one of
/// the block that counts its block (I6). The last ones become durable with the barrier of stage 0, before any pointer
/// that relies on these counts.
Result<> Refcounts::write_entries(uint64_t index, std::span<const be<uint64_t>> entries) {
  // The first block counts those of the first sector; from then on each round multiplies what is counted.
  uint64_t round = kEntriesPerSector - index % kEntriesPerSector;
  for (uint64_t done = 0; done < entries.size(); round = done * (image_.geometry.refcounts_per_block - 1)) {
    const auto now = entries.subspan(done, std::min<uint64_t>(round, entries.size() - done));
    Result<> written = done > 0 ? image_.storage.flush() : Result<>{};
    if (written) written = image_.storage.write(table_offset_ + (index + done) * 8, std::as_bytes(now));
    // Some entries are there, which nobody in memory knows of: that is no error to recover from, whatever its cause.
    if (!written && done > 0) return fail(ErrorCode::io, "{}", written.error().text());
    IMG_TRY(std::move(written));
    done += now.size();
  }
  return {};
}

/// Lays out, from the first cluster of region `index` on: the blocks for the regions that this takes and for some free
/// clusters behind it, then the longer table. The header switches to it when everything else is durable.
Result<uint64_t> Refcounts::grow_table(uint64_t index, uint64_t free_clusters) {
  const Geometry& g = image_.geometry;
  const uint64_t first = index * g.refcounts_per_block;
  uint64_t blocks = 1;
  uint64_t clusters = 0;
  for (uint64_t needed = 1;; blocks = needed) {
    clusters = g.clusters_for((index + blocks) * 8 * 3 / 2);
    needed = divide_up(blocks + clusters + free_clusters, g.refcounts_per_block);
    if (needed <= blocks) break;
  }
  if (clusters * g.cluster_size > kMaxTableBytes) clusters = kMaxTableBytes / g.cluster_size;
  if (clusters * g.cluster_size / 8 < index + blocks)
    return fail(ErrorCode::no_space, "the refcount table would grow past {} bytes", kMaxTableBytes);

  std::vector<uint64_t> table;
  {
    SharedLock lock(image_.mutex);
    if (image_.known.overlaps(first, blocks + clusters))
      return fail(ErrorCode::corrupt, "cluster {:#x} holds metadata but has no reference count",
                  first * g.cluster_size);
    table = table_;
  }
  table.resize(clusters * g.cluster_size / 8);
  for (uint64_t i = 0; i < blocks; ++i) table[index + i] = g.host_of(first + i).bytes();
  const HostOffset offset = g.host_of(first + blocks);

  IMG_TRY(write_blocks(index, blocks, blocks + clusters));
  IMG_TRY(image_.storage.write(offset, bytes_of(to_disk(table))));
  IMG_TRY(image_.storage.flush());
  struct {
    be<uint64_t> offset;
    be<uint32_t> clusters;
  } field{offset.bytes(), static_cast<uint32_t>(clusters)};
  IMG_TRY(image_.header_writer.write(kRefcountTableField, std::as_bytes(std::span(&field, 1))));
  IMG_TRY(image_.storage.flush());

  ExclusiveLock lock(image_.mutex);
  replaced_.push_back({table_offset_, table_clusters_ * g.cluster_size});
  image_.known.remove(g.cluster_of(table_offset_), table_clusters_);
  image_.known.add(first, blocks + clusters);
  table_ = std::move(table);
  table_offset_ = offset;
  table_clusters_ = clusters;
  return first + blocks + clusters;
}

/// In the region of that index; its begin if nothing is counted there.
Result<uint64_t> Refcounts::end_of_counted(uint64_t index) {
  const uint64_t first = index * image_.geometry.refcounts_per_block;
  for (uint64_t end = first + image_.geometry.refcounts_per_block; end > first;) {
    IMG_LET(const Slice slice, slice_of(end - 1));
    if (!slice.pin) return first;
    SharedLock lock(image_.mutex);
    for (; end > slice.first; --end)
      if (get(slice, end - 1) != 0) return end;
  }
  return first;
}

Result<uint64_t> Refcounts::end_of_counted() {
  for (uint64_t index = table().size(); index > 0; --index) {
    IMG_LET(const uint64_t end, end_of_counted(index - 1));
    if (end > (index - 1) * image_.geometry.refcounts_per_block) return end;
  }
  return uint64_t{1};
}

/// None of these entries needs the block of another, so it does not matter which of them a crash leaves.
Result<std::vector<uint64_t>> Refcounts::drop_empty_end() {
  const Geometry& g = image_.geometry;
  const std::vector<uint64_t> table = this->table();
  std::vector<uint64_t> dropped;  // indexes
  uint64_t end = table.size();
  while (end > 0 && (table[end - 1] & kRefcountTableMask) == 0) --end;
  for (uint64_t index = end; index > 1; --index) {
    const uint64_t first = (index - 1) * g.refcounts_per_block;
    const uint64_t block = g.cluster_of(HostOffset(table[index - 1] & kRefcountTableMask));
    if (block != 0) {
      IMG_LET(const uint64_t counted, end_of_counted(index - 1));
      const bool itself_only = block == first && counted == first + 1;
      if (counted != first && !itself_only) break;
      dropped.push_back(index - 1);
    }
  }
  std::vector<uint64_t> counted_elsewhere;
  if (dropped.empty()) return counted_elsewhere;
  const uint64_t last = dropped.back();
  const std::vector<be<uint64_t>> zeros(end - last);
  IMG_TRY(image_.storage.write(table_offset_ + last * 8, bytes_of(zeros)));
  IMG_TRY(image_.storage.flush());

  ExclusiveLock lock(image_.mutex);
  for (const uint64_t index : dropped) {
    const uint64_t block = g.cluster_of(HostOffset(table[index] & kRefcountTableMask));
    table_[index] = 0;
    image_.known.remove(block);
    image_.tables.drop({g.host_of(block), g.cluster_size});
    if (block / g.refcounts_per_block != index) counted_elsewhere.push_back(block);
  }
  return counted_elsewhere;
}

std::vector<uint64_t> Refcounts::table() const {
  SharedLock lock(image_.mutex);
  return table_;
}

HostRange Refcounts::adopt_table(HostOffset offset, std::vector<uint64_t> entries) NO_THREAD_SAFETY_ANALYSIS {
  const Geometry& g = image_.geometry;
  const HostRange old{table_offset_, table_clusters_ * g.cluster_size};
  std::vector<uint64_t> gone, added;
  for (uint64_t i = 0; i < entries.size(); ++i) {
    if (table_[i] == entries[i]) continue;
    gone.push_back(g.cluster_of(HostOffset(table_[i])));
    added.push_back(g.cluster_of(HostOffset(entries[i])));
  }
  image_.known.remove_all(std::move(gone));
  image_.known.add_all(added);
  image_.known.remove(g.cluster_of(table_offset_), table_clusters_);
  image_.known.add(g.cluster_of(offset), table_clusters_);
  table_ = std::move(entries);
  table_offset_ = offset;
  return old;
}

std::vector<HostRange> Refcounts::take_replaced_tables() {
  ExclusiveLock lock(image_.mutex);
  return std::exchange(replaced_, {});
}

}  // namespace imgfuse::qcow2
