#include "format/qcow2/map.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "base/buffer.h"
#include "base/endian.h"

namespace imgfuse::qcow2 {
namespace {

L2Entry entry_at(ConstBytes slice, uint64_t index) {
  be<uint64_t> raw;
  std::memcpy(&raw, &slice[index * 8], sizeof raw);
  return {raw};
}

void set_entry(Bytes slice, uint64_t index, L2Entry entry) {
  const be<uint64_t> raw(entry.raw);
  std::memcpy(&slice[index * 8], &raw, sizeof raw);
}

bool has_host(ClusterKind kind) { return kind == ClusterKind::normal || kind == ClusterKind::zero_allocated; }

}  // namespace

Result<> Map::load(const Header& header, bool writable) {
  const Geometry& g = image_.geometry;
  IMG_LET(const uint64_t file_size, image_.storage.size());
  if (header.l1_entries > 0 && header.l1_offset.bytes() >= file_size)
    return fail(ErrorCode::corrupt, "the L1 table at {:#x} lies past the end of the file ({:#x})",
                header.l1_offset.bytes(), file_size);
  std::vector<be<uint64_t>> stored(header.l1_entries);
  if (!stored.empty()) IMG_TRY(image_.storage.read(header.l1_offset, std::as_writable_bytes(std::span(stored))));

  ExclusiveLock lock(image_.mutex);
  l1_offset_ = header.l1_offset;
  l1_.assign(stored.begin(), stored.end());
  stored = {};  // a large L1 table need not be in memory twice
  const bool l1_overlaps =
      !image_.known.add(g.cluster_of(l1_offset_), l1_.empty() ? 0 : g.clusters_for(l1_.size() * 8));
  if (l1_overlaps && writable)
    return fail(ErrorCode::corrupt,
                "the L1 table at {:#x} overlaps other metadata; repair it with imgfuse check "
                "--repair all",
                l1_offset_.bytes());
  if (!writable) return {};  // nothing will be written over a table
  std::vector<uint64_t> tables;
  tables.reserve(l1_.size());
  for (uint64_t i = 0; i < l1_.size(); ++i) {
    IMG_TRY(check_table({l1_[i]}, i));
    if (!L1Entry{l1_[i]}.present()) continue;
    tables.push_back(g.cluster_of(L1Entry{l1_[i]}.table()));
  }
  if (uint64_t twice = image_.known.add_all(tables); twice != 0)
    return fail(ErrorCode::corrupt, "the cluster at {:#x} is used twice as a table; the image can only be read",
                twice * g.cluster_size);
  return {};
}

Result<> Map::check_table(L1Entry l1, uint64_t index) const {
  const Geometry& g = image_.geometry;
  if (l1.raw & kL1Reserved)
    return fail(ErrorCode::corrupt, "L1 entry {} is {:#x}: reserved bits are set", index, l1.raw);
  if (l1.table().bytes() % g.cluster_size != 0)
    return fail(ErrorCode::corrupt, "L1 entry {} points at {:#x}, which is not a multiple of the cluster size {:#x}",
                index, l1.table().bytes(), g.cluster_size);
  return {};
}

/// A table past the end would read as zeros: a file that was cut off would look like an empty disk.
Result<> Map::check_in_file(L1Entry l1, uint64_t index) const {
  IMG_LET(const uint64_t file_size, image_.storage.size());
  if (l1.table().bytes() >= file_size)
    return fail(ErrorCode::corrupt, "L1 entry {} points at {:#x}, past the end of the file ({:#x})", index,
                l1.table().bytes(), file_size);
  return {};
}

Result<> Map::check_entry(L2Entry entry, GuestOffset guest) const {
  const Geometry& g = image_.geometry;
  const auto bad = [&](const char* what) {
    return fail(ErrorCode::corrupt, "L2 entry {:#x} for guest offset {:#x} {}", entry.raw, guest.bytes(), what);
  };
  switch (entry.kind()) {
    case ClusterKind::compressed: {
      const unsigned offset_bits = 70 - g.cluster_bits;
      if (entry.raw & kCopied) return bad("is compressed and marked as copied");
      if (offset_bits > 56 && (entry.raw & ((uint64_t{1} << offset_bits) - 1)) >= kMaxHostOffset)
        return bad("points past 2^56");
      const CompressedRange range = entry.compressed_range(g.cluster_bits);
      const uint64_t first = g.cluster_of(range.offset);
      if (image_.known.overlaps(first, g.cluster_of(range.offset + (range.length - 1)) - first + 1))
        return bad("points at metadata");
      return {};
    }
    case ClusterKind::normal:
    case ClusterKind::zero_allocated:
      if (entry.host().bytes() % g.cluster_size != 0) return bad("points into the middle of a cluster");
      if (image_.known.overlaps(g.cluster_of(entry.host()))) return bad("points at metadata");
      break;
    case ClusterKind::reserved:
    case ClusterKind::unallocated:
    case ClusterKind::zero_plain:
      break;
  }
  if (entry.raw & kL2Reserved) return bad("has reserved bits set");
  if ((entry.raw & kZeroFlag) && !g.has_zero_flag()) return bad("has the zero flag, which version 2 does not know");
  return {};
}

Map::SlicePlace Map::place(L1Entry l1, GuestOffset guest) const {
  const uint64_t index = image_.geometry.l2_index(guest);
  const uint64_t per_slice = image_.geometry.slice_entries();
  return {l1.table() + index / per_slice * image_.geometry.slice_bytes, index % per_slice};
}

Result<L1Entry> Map::l1_entry(GuestOffset guest) const {
  const uint64_t index = image_.geometry.l1_index(guest);
  SharedLock lock(image_.mutex);
  if (index >= l1_.size()) return L1Entry{};
  const L1Entry entry{l1_[index]};
  IMG_TRY(check_table(entry, index));
  return entry;
}

Result<Mapping> Map::lookup(GuestRange range) {
  const Geometry& g = image_.geometry;
  const uint64_t l1_index = g.l1_index(range.begin);
  for (;;) {
    IMG_LET(const L1Entry l1, l1_entry(range.begin));
    if (!l1.present()) {
      const uint64_t coverage_left = g.l2_coverage - range.begin.bytes() % g.l2_coverage;
      Mapping nothing;
      nothing.length = std::min(range.length, coverage_left);
      return nothing;
    }
    IMG_TRY(check_in_file(l1, l1_index));
    const SlicePlace where = place(l1, range.begin);
    IMG_LET(const TableCache::Pin slice, image_.tables.pin(where.offset));
    SharedLock lock(image_.mutex);
    if (L1Entry{l1_[l1_index]} == l1) return read_run(slice.content(), where.first_index, range);
    // The table was copied while its slice was loaded: look again.
  }
}

Result<Mapping> Map::read_run(ConstBytes slice, uint64_t index, GuestRange range) const {
  const Geometry& g = image_.geometry;
  const L2Entry first = entry_at(slice, index);
  IMG_TRY(check_entry(first, range.begin));
  const uint64_t within = range.begin.bytes() % g.cluster_size;
  Mapping run;
  run.kind = first.kind();
  run.length = g.cluster_size - within;
  if (run.kind == ClusterKind::compressed) {
    run.compressed = first.compressed_range(g.cluster_bits);
  } else {
    run.copied = first.copied();
    if (has_host(run.kind)) run.host = first.host() + within;
    const uint64_t end = std::min(index + g.clusters_for(within + range.length), g.slice_entries());
    for (uint64_t i = index + 1; i < end; ++i, run.length += g.cluster_size) {
      const L2Entry next = entry_at(slice, i);
      const uint64_t expected = has_host(run.kind) ? first.host().bytes() + (i - index) * g.cluster_size : 0;
      const bool continues = next.kind() == run.kind && next.copied() == run.copied &&
                             (!has_host(run.kind) || next.host().bytes() == expected);
      if (!continues) break;
      if (Result<> good = check_entry(next, range.begin + run.length); !good) break;  // reported when it is reached
    }
  }
  run.length = std::min(run.length, range.length);
  return run;
}

Result<TableCache::Pin> Map::writable_slice(GuestOffset guest) {
  const uint64_t l1_index = image_.geometry.l1_index(guest);
  for (;;) {
    IMG_LET(const L1Entry l1, l1_entry(guest));
    if (!l1.present() || !l1.copied()) {
      IMG_TRY(make_table(l1_index));
      continue;
    }
    IMG_TRY(check_in_file(l1, l1_index));
    IMG_LET(TableCache::Pin slice, image_.tables.pin(place(l1, guest).offset));
    SharedLock lock(image_.mutex);
    if (L1Entry{l1_[l1_index]} == l1) return slice;
  }
}

/// Gives L1 entry `l1_index` an L2 table of its own. The table's first content, zeros or a copy of the shared one, is
/// written as data: the next barrier makes it durable before the L1 entry can be (I3).
Result<> Map::make_table(uint64_t l1_index) {
  const Geometry& g = image_.geometry;
  Lock making(tables_);
  L1Entry old;
  {
    SharedLock lock(image_.mutex);
    if (l1_index >= l1_.size())
      return fail(ErrorCode::corrupt, "the L1 table has {} entries but entry {} is needed", l1_.size(), l1_index);
    old = L1Entry{l1_[l1_index]};
  }
  if (old.present() && old.copied()) return {};  // somebody else made it
  IMG_LET(Reservation cluster, allocator_.reserve(1));
  const HostRange table{cluster.host(), g.cluster_size};
  if (old.present()) {
    Buffer content(g.cluster_size);
    IMG_TRY(image_.storage.read(old.table(), content.bytes()));
    IMG_TRY(image_.storage.write(table.begin, content.bytes()));
  } else {
    IMG_TRY(image_.storage.write(table.begin, zeroes(g.cluster_size)));
  }
  image_.tables.drop(table);

  ExclusiveLock lock(image_.mutex);
  l1_[l1_index] = L1Entry::of(table.begin).raw;
  dirty_l1_.push_back(l1_index);
  image_.known.add(g.cluster_of(table.begin));
  cluster.commit();
  if (old.present()) {
    image_.known.remove(g.cluster_of(old.table()));
    allocator_.quarantine(old.table(), 1, HostSpace::keep);
  }
  return {};
}

/// Drops one reference of everything that the entry points at.
void Map::give_up(L2Entry entry, HostSpace space) {
  const Geometry& g = image_.geometry;
  if (entry.kind() == ClusterKind::compressed) {
    const CompressedRange range = entry.compressed_range(g.cluster_bits);
    const uint64_t first = g.cluster_of(range.offset);
    const uint64_t last = g.cluster_of(range.offset + (range.length - 1));
    allocator_.quarantine(g.host_of(first), last - first + 1, HostSpace::keep);
  } else if (entry.holds_host()) {
    allocator_.quarantine(entry.host(), 1, space);
  }
}

template <class Change>
void Map::change(const TableCache::Pin& slice, GuestOffset guest, uint64_t clusters, HostSpace space,
                 Change&& entry_for) {
  const Geometry& g = image_.geometry;
  const uint64_t first = g.l2_index(guest) % g.slice_entries();
  assert(first + clusters <= g.slice_entries());

  ExclusiveLock lock(image_.mutex);
  const Bytes entries = image_.tables.edit(slice, kMapStage);
  for (uint64_t i = 0; i < clusters; ++i) {
    const L2Entry old = entry_at(entries, first + i);
    const L2Entry next = entry_for(i, old);
    set_entry(entries, first + i, next);
    const bool keeps_host = has_host(old.kind()) && has_host(next.kind()) && old.host() == next.host();
    if (!keeps_host) give_up(old, space);
    if (guest.bytes() + i * g.cluster_size < counted_)
      allocated_ += (next.holds_host() ? g.cluster_size : 0) - (old.holds_host() ? g.cluster_size : 0);
  }
}

void Map::link(const TableCache::Pin& slice, GuestOffset guest, HostOffset host, uint64_t clusters) {
  change(slice, guest, clusters, HostSpace::keep,
         [&](uint64_t i, L2Entry) { return image_.geometry.l2.normal(host + i * image_.geometry.cluster_size); });
}

void Map::link_compressed(const TableCache::Pin& slice, GuestOffset guest, std::span<const CompressedRange> streams) {
  change(slice, guest, streams.size(), HostSpace::keep,
         [&](uint64_t i, L2Entry) { return L2Entry::compressed(streams[i], image_.geometry.cluster_bits); });
}

void Map::link_zero(const TableCache::Pin& slice, GuestOffset guest, HostOffset host, uint64_t clusters) {
  change(slice, guest, clusters, HostSpace::keep, [&](uint64_t i, L2Entry) {
    return L2Entry{image_.geometry.l2.normal(host + i * image_.geometry.cluster_size).raw | kZeroFlag};
  });
}

void Map::zero(const TableCache::Pin& slice, GuestOffset guest, uint64_t clusters, bool keep) {
  change(slice, guest, clusters, HostSpace::punch, [&](uint64_t, L2Entry old) {
    return keep && has_host(old.kind()) ? L2Entry{old.raw | kZeroFlag} : image_.geometry.l2.zero_plain();
  });
}

void Map::unmap(const TableCache::Pin& slice, GuestOffset guest, uint64_t clusters) {
  change(slice, guest, clusters, HostSpace::punch, [](uint64_t, L2Entry) { return L2Entry{}; });
}

Map::L1Changes Map::freeze_l1() NO_THREAD_SAFETY_ANALYSIS {
  L1Changes changes{l1_offset_, {}};
  std::sort(dirty_l1_.begin(), dirty_l1_.end());
  dirty_l1_.erase(std::unique(dirty_l1_.begin(), dirty_l1_.end()), dirty_l1_.end());
  for (uint64_t index : dirty_l1_) changes.entries.emplace_back(index, l1_[index]);
  dirty_l1_.clear();
  return changes;
}

Result<> Map::write_l1(const L1Changes& changes) {
  std::vector<be<uint64_t>> run;
  for (auto first = changes.entries.begin(); first != changes.entries.end();) {
    run.clear();
    auto next = first;
    for (; next != changes.entries.end() && next->first == first->first + run.size(); ++next)
      run.emplace_back(next->second);
    IMG_TRY(image_.storage.write(changes.table + first->first * 8, std::as_bytes(std::span(run))));
    first = next;
  }
  return {};
}

void Map::keep_l1(const L1Changes& changes) {
  ExclusiveLock lock(image_.mutex);
  for (const auto& [index, value] : changes.entries) dirty_l1_.push_back(index);
}

uint64_t Map::l1_entries() const {
  SharedLock lock(image_.mutex);
  return l1_.size();
}

GuestOffset Map::tables_end() const {
  SharedLock lock(image_.mutex);
  uint64_t entries = l1_.size();
  while (entries > 0 && !L1Entry{l1_[entries - 1]}.present()) --entries;
  return GuestOffset(entries * image_.geometry.l2_coverage);
}

std::vector<std::byte> Map::encode_l1(uint64_t entries) const {
  SharedLock lock(image_.mutex);
  std::vector<be<uint64_t>> table(l1_.begin(), l1_.end());
  table.resize(image_.geometry.clusters_for(entries * 8) * image_.geometry.cluster_size / 8);
  const auto bytes = std::as_bytes(std::span(table));
  return {bytes.begin(), bytes.end()};
}

void Map::adopt_l1(HostOffset offset, uint64_t entries) {
  const Geometry& g = image_.geometry;
  ExclusiveLock lock(image_.mutex);
  const uint64_t old_clusters = g.clusters_for(l1_.size() * 8);
  if (old_clusters > 0) {
    image_.known.remove(g.cluster_of(l1_offset_), old_clusters);
    allocator_.quarantine(l1_offset_, old_clusters, HostSpace::keep);
  }
  image_.known.add(g.cluster_of(offset), g.clusters_for(entries * 8));
  l1_offset_ = offset;
  l1_.resize(entries);
}

std::vector<uint64_t> Map::l1_table() const {
  SharedLock lock(image_.mutex);
  return l1_;
}

HostRange Map::l1_place() const {
  SharedLock lock(image_.mutex);
  return {l1_offset_, l1_.size() * 8};
}

void Map::replace_l1(HostOffset offset, std::vector<uint64_t> entries) NO_THREAD_SAFETY_ANALYSIS {
  const Geometry& g = image_.geometry;
  assert(dirty_l1_.empty());
  const auto tables = [&g](const std::vector<uint64_t>& table) {
    std::vector<uint64_t> clusters;
    for (const uint64_t entry : table)
      if (L1Entry{entry}.present()) clusters.push_back(g.cluster_of(L1Entry{entry}.table()));
    return clusters;
  };
  image_.known.remove(g.cluster_of(l1_offset_), g.clusters_for(l1_.size() * 8));
  image_.known.remove_all(tables(l1_));
  image_.known.add(g.cluster_of(offset), g.clusters_for(entries.size() * 8));
  image_.known.add_all(tables(entries));
  l1_offset_ = offset;
  l1_ = std::move(entries);
}

void Map::set_allocated(uint64_t bytes) NO_THREAD_SAFETY_ANALYSIS {
  counted_ = ~uint64_t{0};
  allocated_ = bytes;
}

Result<bool> Map::count_next(uint64_t size) {
  const Geometry& g = image_.geometry;
  GuestOffset next;
  {
    ExclusiveLock lock(image_.mutex);
    while (counted_ < size &&
           (counted_ / g.l2_coverage >= l1_.size() || !L1Entry{l1_[counted_ / g.l2_coverage]}.present()))
      counted_ += g.l2_coverage;
    if (counted_ >= size) return false;
    next = GuestOffset(counted_);
  }
  IMG_LET(const L1Entry l1, l1_entry(next));
  IMG_LET(const TableCache::Pin slice, image_.tables.pin(place(l1, next).offset));
  ExclusiveLock lock(image_.mutex);
  if (L1Entry{l1_[g.l1_index(next)]} != l1) return true;  // copied meanwhile: the next call looks again
  const ConstBytes entries = slice.content();
  uint64_t found = 0;
  for (uint64_t i = 0; i < g.slice_entries(); ++i) found += entry_at(entries, i).holds_host();
  allocated_ += found * g.cluster_size;
  counted_ += g.slice_coverage();
  return true;
}

}  // namespace imgfuse::qcow2
