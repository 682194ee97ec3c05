#include "format/qed/map.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <span>

#include "base/endian.h"

namespace imgfuse::qed {
namespace {

/// The slice belongs to the cache's owner under Image::mutex.
uint64_t load_entry(ConstBytes slice, uint64_t index) {
  le<uint64_t> entry;
  std::memcpy(&entry, &slice[index * sizeof entry], sizeof entry);
  return entry;
}

void store_entry(Bytes slice, uint64_t index, uint64_t value) {
  const le<uint64_t> entry = value;
  std::memcpy(&slice[index * sizeof entry], &entry, sizeof entry);
}

ClusterKind kind_of(uint64_t entry) {
  if (entry == kUnallocated) return ClusterKind::unallocated;
  return entry == kZeroCluster ? ClusterKind::zero : ClusterKind::data;
}

}  // namespace

Result<> Map::load(bool writable) {
  const Result<> loaded = load_more(image_.header.image_size);
  if (loaded || writable) return loaded;
  // To be read it only has to be there: what is wrong with a table is told when it is met.
  return loaded.error().code() == ErrorCode::corrupt ? Result<>{} : loaded;
}

Result<> Map::load_more(uint64_t image_size) {
  const Header& header = image_.header;
  const uint64_t wanted = image_size / header.coverage() + (image_size % header.coverage() != 0);
  uint64_t have = 0;
  {
    SharedLock lock(image_.mutex);
    have = l1_.size();
  }
  if (wanted <= have) return {};
  std::vector<le<uint64_t>> stored(wanted - have);
  IMG_TRY(image_.storage.read(header.l1_offset + have * 8, std::as_writable_bytes(std::span(stored))));

  std::vector<HostOffset> tables;
  Result<> sound;
  for (uint64_t i = 0; i < stored.size(); ++i) {
    if (stored[i] == kUnallocated) continue;
    if (Result<> good = check_table(stored[i], have + i); good) {
      tables.emplace_back(stored[i]);
    } else if (sound) {
      sound = std::move(good);
    }
  }
  ExclusiveLock lock(image_.mutex);
  l1_.insert(l1_.end(), stored.begin(), stored.end());
  if (have == 0) tables.push_back(header.l1_offset);
  const HostOffset twice = image_.places.add_all(tables);
  if (sound && twice != HostOffset(0))
    return fail(ErrorCode::corrupt, "the table at {:#x} overlaps another one; the image can only be read",
                twice.bytes());
  return sound;
}

uint64_t Map::l1_entry(uint64_t index) const {
  SharedLock lock(image_.mutex);
  return index < l1_.size() ? l1_[index] : kUnallocated;
}

Result<> Map::check_table(uint64_t entry, uint64_t index) const {
  const HostOffset end(image_.end.load(std::memory_order_relaxed));
  const HostRange table{HostOffset(entry), image_.geometry.table_bytes};
  if (is_place(image_.header, table.begin, table.length, end)) {
    if (!table.overlaps({image_.header.l1_offset, table.length})) return {};
    image_.damaged = true;
    return fail(ErrorCode::corrupt, "L1 entry {} is {:#x}, where the L1 table itself lies", index, entry);
  }
  image_.damaged = true;
  return fail(ErrorCode::corrupt,
              "L1 entry {} is {:#x}, which is no place for a table of {} bytes in a file of {:#x} with clusters of {}",
              index, entry, image_.geometry.table_bytes, end.bytes(), image_.geometry.cluster_size);
}

Result<> Map::check_entry(uint64_t entry, GuestOffset guest) const {
  if (entry <= kZeroCluster) return {};
  const HostOffset end(image_.end.load(std::memory_order_relaxed));
  const HostOffset host(entry);
  const bool in_file = is_place(image_.header, host, image_.geometry.cluster_size, end);
  if (in_file && !image_.places.contains(host)) return {};
  image_.damaged = true;
  if (in_file)
    return fail(ErrorCode::corrupt, "L2 entry {:#x} for guest offset {:#x} points at a table", entry, guest.bytes());
  return fail(ErrorCode::corrupt,
              "L2 entry {:#x} for guest offset {:#x} is no place for data in a file of {:#x} with clusters of {}",
              entry, guest.bytes(), end.bytes(), image_.geometry.cluster_size);
}

HostOffset Map::slice_place(uint64_t table, GuestOffset guest) const {
  return HostOffset(table) + image_.geometry.l2_index(guest) / Geometry::kSliceEntries * Geometry::kSliceBytes;
}

/// An L1 entry that is not 0 stays what it is, so the slice is right whenever it is looked at.
Result<Mapping> Map::lookup(GuestRange range) {
  const Geometry& g = image_.geometry;
  const uint64_t index = g.l1_index(range.begin);
  const uint64_t table = l1_entry(index);
  if (table == kUnallocated)
    return Mapping{.length = std::min(range.length, g.coverage - range.begin.bytes() % g.coverage)};
  IMG_TRY(check_table(table, index));
  const HostOffset place = slice_place(table, range.begin);
  {
    SharedLock lock(image_.mutex);
    auto found = image_.tables.look_at(
        place, [&](ConstBytes slice) NO_THREAD_SAFETY_ANALYSIS { return read_run(slice, range); });
    if (found) return *std::move(found);
  }
  IMG_LET(const TableCache::Pin slice, image_.tables.pin(place));
  SharedLock lock(image_.mutex);
  return read_run(slice.content(), range);
}

Result<Mapping> Map::read_run(ConstBytes slice, GuestRange range) const {
  const Geometry& g = image_.geometry;
  const uint64_t first_index = g.l2_index(range.begin) % Geometry::kSliceEntries;
  const uint64_t within = range.begin.bytes() % g.cluster_size;
  const uint64_t first = load_entry(slice, first_index);
  IMG_TRY(check_entry(first, range.begin));
  Mapping run{.kind = kind_of(first)};
  if (run.kind == ClusterKind::data) run.host = HostOffset(first) + within;
  const uint64_t most =
      std::min(divide_up(within + range.length, g.cluster_size), Geometry::kSliceEntries - first_index);
  uint64_t count = 1;
  for (; count < most; ++count) {
    const uint64_t next = load_entry(slice, first_index + count);
    if (next != (run.kind == ClusterKind::data ? first + count * g.cluster_size : first)) break;
    // What is wrong with an entry is reported when it is reached.
    if (!check_entry(next, range.begin + (count * g.cluster_size - within))) break;
  }
  run.length = std::min(range.length, count * g.cluster_size - within);
  return run;
}

Result<TableCache::Pin> Map::writable_slice(GuestOffset guest) {
  const uint64_t index = image_.geometry.l1_index(guest);
  uint64_t table = l1_entry(index);
  if (table == kUnallocated) {
    IMG_LET(table, make_table(index));
  }
  IMG_TRY(check_table(table, index));
  return image_.tables.pin(slice_place(table, guest));
}

/// New clusters read as zeros, so the table is complete, and durable with the next barrier: before its L1 entry (I3).
Result<uint64_t> Map::make_table(uint64_t l1_index) {
  Lock making(tables_);
  if (const uint64_t made = l1_entry(l1_index); made != kUnallocated) return made;  // by somebody else
  IMG_LET(Reservation table, allocator_.reserve(image_.geometry.table_bytes));
  image_.tables.drop(table.range());

  ExclusiveLock lock(image_.mutex);
  assert(l1_index < l1_.size());
  l1_[l1_index] = table.host().bytes();
  dirty_l1_.push_back(l1_index);
  [[maybe_unused]] const bool apart = image_.places.add(table.host());
  assert(apart);
  table.commit();
  return l1_[l1_index];
}

/// `entry_for(i)` gives the new entry of the i-th cluster of the range.
template <class EntryFor>
void Map::change(const TableCache::Pin& slice, GuestRange range, EntryFor entry_for) {
  const Geometry& g = image_.geometry;
  const uint64_t first = g.l2_index(range.begin) % Geometry::kSliceEntries;
  const uint64_t count = range.length / g.cluster_size;
  assert(first + count <= Geometry::kSliceEntries);
  ExclusiveLock lock(image_.mutex);
  const Bytes entries = image_.tables.edit(slice, kMapStage, first * 8, count * 8);
  for (uint64_t i = 0; i < count; ++i) {
    assert(kind_of(load_entry(entries, first + i)) != ClusterKind::data);  // I4
    const uint64_t entry = entry_for(i);
    store_entry(entries, first + i, entry);
    if (kind_of(entry) == ClusterKind::data && (range.begin + i * g.cluster_size).bytes() < counted_)
      allocated_ += g.cluster_size;
  }
}

void Map::link(const TableCache::Pin& slice, GuestRange range, HostOffset host) {
  change(slice, range, [&](uint64_t i) { return (host + i * image_.geometry.cluster_size).bytes(); });
}

void Map::link_zero(const TableCache::Pin& slice, GuestRange range) {
  change(slice, range, [](uint64_t) { return kZeroCluster; });
}

Map::L1Changes Map::freeze_l1() NO_THREAD_SAFETY_ANALYSIS {
  L1Changes changes;
  std::sort(dirty_l1_.begin(), dirty_l1_.end());
  for (const uint64_t index : dirty_l1_) changes.emplace_back(index, l1_[index]);
  dirty_l1_.clear();
  return changes;
}

Result<> Map::write_l1(const L1Changes& changes) {
  std::vector<le<uint64_t>> run;
  for (auto first = changes.begin(); first != changes.end();) {
    run.clear();
    auto next = first;
    for (; next != changes.end() && next->first == first->first + run.size(); ++next) run.emplace_back(next->second);
    IMG_TRY(image_.storage.write(image_.header.l1_offset + first->first * 8, std::as_bytes(std::span(run))));
    first = next;
  }
  return {};
}

void Map::keep_l1(const L1Changes& changes) {
  ExclusiveLock lock(image_.mutex);
  for (const auto& [index, value] : changes) dirty_l1_.push_back(index);
}

GuestOffset Map::tables_end() const {
  SharedLock lock(image_.mutex);
  uint64_t entries = l1_.size();
  while (entries > 0 && l1_[entries - 1] == kUnallocated) --entries;
  return GuestOffset(entries * image_.geometry.coverage);
}

Result<bool> Map::count_next(uint64_t size) {
  const Geometry& g = image_.geometry;
  GuestOffset next;
  uint64_t table = 0;
  {
    ExclusiveLock lock(image_.mutex);
    while (counted_ < size &&
           (g.l1_index(GuestOffset(counted_)) >= l1_.size() || l1_[g.l1_index(GuestOffset(counted_))] == kUnallocated))
      counted_ += g.coverage;
    if (counted_ >= size) return false;
    next = GuestOffset(counted_);
    table = l1_[g.l1_index(next)];
  }
  IMG_TRY(check_table(table, g.l1_index(next)));
  IMG_LET(const TableCache::Pin slice, image_.tables.pin(slice_place(table, next)));
  ExclusiveLock lock(image_.mutex);
  for (uint64_t i = 0; i < Geometry::kSliceEntries; ++i)
    if (kind_of(load_entry(slice.content(), i)) == ClusterKind::data) allocated_ += g.cluster_size;
  counted_ += g.slice_coverage();
  return true;
}

}  // namespace imgfuse::qed
