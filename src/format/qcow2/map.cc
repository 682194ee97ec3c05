#include "format/qcow2/map.h"

#include <algorithm>
#include <bit>
#include <cassert>

#include "base/buffer.h"
#include "base/endian.h"
#include "core/pieces.h"

namespace imgfuse::qcow2 {

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
  const bool good = (l1.raw & kL1Reserved) == 0 && l1.table().bytes() % g.cluster_size == 0;
  if (good) return {};
  image_.damaged = true;
  if (l1.raw & kL1Reserved)
    return fail(ErrorCode::corrupt, "L1 entry {} is {:#x}: reserved bits are set", index, l1.raw);
  return fail(ErrorCode::corrupt, "L1 entry {} points at {:#x}, which is not a multiple of the cluster size {:#x}",
              index, l1.table().bytes(), g.cluster_size);
}

/// The slice with the entry of `guest`. A table past the end would read as zeros: a file that was cut off would look
/// like an empty disk. So no such slice comes into the cache.
Result<TableCache::Pin> Map::load_slice(L1Entry l1, GuestOffset guest) const {
  IMG_LET(const uint64_t file_size, image_.storage.size());
  if (l1.table().bytes() < file_size) return image_.tables.pin(place(l1, guest).offset);
  image_.damaged = true;
  return fail(ErrorCode::corrupt, "L1 entry {} points at {:#x}, past the end of the file ({:#x})",
              image_.geometry.l1_index(guest), l1.table().bytes(), file_size);
}

Result<> Map::check_entry(L2Entry entry, GuestOffset guest) const {
  const Geometry& g = image_.geometry;
  const auto bad = [&](const char* what) {
    image_.damaged = true;
    return fail(ErrorCode::corrupt, "L2 entry {:#x} for guest offset {:#x} {}", entry.raw, guest.bytes(), what);
  };
  if (!g.l2.valid(entry)) return bad("has a subcluster bitmap that contradicts itself");
  if (g.l2.is_compressed(entry)) {
    const unsigned offset_bits = 70 - g.cluster_bits;
    if (g.l2.data_file) return bad("is compressed, which an image with a data file cannot be");
    if (entry.raw & kCopied) return bad("is compressed and marked as copied");
    if (offset_bits > 56 && (entry.raw & ((uint64_t{1} << offset_bits) - 1)) >= kMaxHostOffset)
      return bad("points past 2^56");
    const CompressedRange range = entry.compressed_range(g.cluster_bits);
    const uint64_t first = g.cluster_of(range.offset);
    if (image_.known.overlaps(first, g.cluster_of(range.offset + (range.length - 1)) - first + 1))
      return bad("points at metadata");
    return {};
  }
  if (g.l2.has_host(entry)) {
    if (entry.host().bytes() % g.cluster_size != 0) return bad("points into the middle of a cluster");
    if (g.l2.data_file && entry.host().bytes() != round_down(guest.bytes(), g.cluster_size))
      return bad("points at another place of the data file");
    if (!g.l2.data_file && image_.known.overlaps(g.cluster_of(entry.host()))) return bad("points at metadata");
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
  SharedLock lock(image_.mutex);
  return l1_entry_locked(guest);
}

Result<L1Entry> Map::l1_entry_locked(GuestOffset guest) const {
  const uint64_t index = image_.geometry.l1_index(guest);
  if (index >= l1_.size()) return L1Entry{};
  const L1Entry entry{l1_[index]};
  IMG_TRY(check_table(entry, index));
  return entry;
}

template <class Look, class Nothing>
auto Map::look_up(GuestOffset guest, Look look, Nothing nothing) -> decltype(nothing()) {
  {
    SharedLock lock(image_.mutex);
    IMG_LET(const L1Entry l1, l1_entry_locked(guest));
    if (!l1.present()) return nothing();
    const SlicePlace where = place(l1, guest);
    auto found =
        image_.tables.look_at(where.offset, [&](ConstBytes slice) { return look(slice, where.first_index, l1); });
    if (found) return *std::move(found);
  }
  for (;;) {  // the slice has to be loaded
    IMG_LET(const L1Entry l1, l1_entry(guest));
    if (!l1.present()) return nothing();
    IMG_LET(const TableCache::Pin slice, load_slice(l1, guest));
    SharedLock lock(image_.mutex);
    if (L1Entry{l1_[image_.geometry.l1_index(guest)]} == l1)
      return look(slice.content(), place(l1, guest).first_index, l1);
    // The table was copied while its slice was loaded: look again.
  }
}

Result<Mapping> Map::lookup(GuestRange range) {
  return look_up(
      range.begin,
      [&](ConstBytes slice, uint64_t index, L1Entry)
          NO_THREAD_SAFETY_ANALYSIS { return read_run(slice, index, range); },
      [&]() -> Result<Mapping> {
        const uint64_t coverage = image_.geometry.l2_coverage;
        Mapping nothing;
        nothing.length = std::min(range.length, coverage - range.begin.bytes() % coverage);
        return nothing;
      });
}

Result<Mapping> Map::read_run(ConstBytes slice, uint64_t index, GuestRange range) const {
  const Geometry& g = image_.geometry;
  L2Entry entry = g.l2.load(slice, index);
  IMG_TRY(check_entry(entry, range.begin));
  const uint64_t within = range.begin.bytes() % g.cluster_size;
  uint64_t next = within / g.subcluster_size;  // subcluster, counted from the first cluster's first one
  Mapping run;
  run.kind = g.l2.kind(entry, static_cast<uint32_t>(next));
  if (run.kind == ClusterKind::compressed) {
    run.compressed = entry.compressed_range(g.cluster_bits);
    run.length = std::min(range.length, g.cluster_size - within);
    return run;
  }
  const HostOffset host = entry.host();
  const bool has_host = g.l2.has_host(entry);
  if (has_host) run.host = host + within;
  const uint32_t per_cluster = g.l2.subclusters();
  const uint64_t end =
      std::min(divide_up(within + range.length, g.subcluster_size), (g.slice_entries() - index) * per_cluster);
  for (++next; next < end; ++next) {
    const uint64_t cluster = next / per_cluster;
    if (next % per_cluster == 0) {
      entry = g.l2.load(slice, index + cluster);
      if (has_host && entry.host() != host + cluster * g.cluster_size) break;
    }
    if (g.l2.kind(entry, static_cast<uint32_t>(next % per_cluster)) != run.kind) break;
    // What is wrong with an entry is reported when it is reached.
    if (next % per_cluster == 0 && !check_entry(entry, range.begin + (cluster * g.cluster_size - within))) break;
  }
  run.length = std::min(range.length, next * g.subcluster_size - within);
  return run;
}

/// Bits of those subclusters of the cluster at `cluster` that the range touches.
uint64_t Map::touched(GuestRange range, GuestOffset cluster) const {
  const Geometry& g = image_.geometry;
  const uint64_t begin = std::max(range.begin.bytes(), cluster.bytes()) - cluster.bytes();
  const uint64_t end = std::min(range.end().bytes() - cluster.bytes(), g.cluster_size);
  const uint64_t first = begin / g.subcluster_size;
  return ((uint64_t{1} << (divide_up(end, g.subcluster_size) - first)) - 1) << first;
}

Result<WriteRun> Map::plan_write(GuestRange range) {
  const Geometry& g = image_.geometry;
  range.length = std::min(range.length, g.slice_coverage() - range.begin.bytes() % g.slice_coverage());
  return look_up(
      range.begin,
      [&](ConstBytes slice, uint64_t index, L1Entry l1)
          NO_THREAD_SAFETY_ANALYSIS { return write_run(slice, index, range, l1.copied()); },
      [&]() -> Result<WriteRun> {
        const GuestRange filled = around(range, {}, {});
        return WriteRun{.length = range.length, .head = range.begin - filled.begin, .tail = filled.end() - range.end()};
      });
}

Result<WriteRun> Map::write_run(ConstBytes slice, uint64_t index, GuestRange range, bool table_copied) const {
  const Geometry& g = image_.geometry;
  const uint64_t within = range.begin.bytes() % g.cluster_size;
  const uint64_t clusters = g.clusters_for(within + range.length);
  GuestOffset cluster = range.begin - within;
  const L2Entry first = g.l2.load(slice, index);
  IMG_TRY(check_entry(first, range.begin));
  const auto owned = [&](L2Entry entry) { return table_copied && entry.copied() && g.l2.has_host(entry); };
  const auto has_bytes = [&](L2Entry entry, uint64_t subclusters) {
    if (!g.l2.extended) return g.l2.kind(entry) == ClusterKind::normal;
    return (entry.bitmap & subclusters) == subclusters;
  };

  WriteRun run;
  run.in_place = owned(first);
  if (run.in_place) run.host = first.host() + within;
  run.linked = run.in_place && has_bytes(first, touched(range, cluster));
  L2Entry last = first;
  uint64_t count = 1;
  for (; count < clusters; ++count) {
    const L2Entry next = g.l2.load(slice, index + count);
    if (owned(next) != run.in_place) break;
    if (run.in_place && next.host() != first.host() + count * g.cluster_size) break;
    cluster = cluster + g.cluster_size;
    if (!check_entry(next, cluster)) break;  // reported when it is reached
    run.linked = run.linked && has_bytes(next, touched(range, cluster));
    last = next;
  }
  run.length = std::min(range.length, count * g.cluster_size - within);
  if (run.linked) return run;

  const GuestRange written{range.begin, run.length};
  GuestRange filled = round_out(written, g.subcluster_size);
  if (run.in_place) {
    if (has_bytes(first, touched({range.begin, 1}, range.begin - within)))
      filled = {range.begin, filled.end() - range.begin};
    if (has_bytes(last,
                  touched({written.end() - 1, 1}, GuestOffset(round_down(written.end().bytes() - 1, g.cluster_size)))))
      filled.length = written.end() - filled.begin;
  } else {
    filled = around(written, first, last);
  }
  run.head = range.begin - filled.begin;
  run.tail = filled.end() - written.end();
  return run;
}

/// What has to be written to new clusters when `range` is: whole subclusters, and between them and it what the first
/// and the last cluster hold until now and would lose.
GuestRange Map::around(GuestRange range, L2Entry first, L2Entry last) const {
  const Geometry& g = image_.geometry;
  const GuestRange clusters = round_out(range, g.cluster_size);
  const GuestRange whole = round_out(range, g.subcluster_size);
  const auto held = [&](L2Entry entry) -> uint64_t {
    if (g.l2.is_compressed(entry)) return L2Format::kAllSubclusters;
    return g.l2.has_host(entry) ? entry.bitmap & L2Format::kAllSubclusters : 0;
  };
  uint64_t begin = whole.begin.bytes();
  uint64_t end = whole.end().bytes();
  if (g.l2.extended && held(first) != 0)
    begin = std::min(begin, clusters.begin.bytes() + std::countr_zero(held(first)) * g.subcluster_size);
  if (g.l2.extended && held(last) != 0)
    end = std::max(end, clusters.end().bytes() - (std::countl_zero(held(last)) - 32) * g.subcluster_size);
  return {GuestOffset(begin), end - begin};
}

Result<TableCache::Pin> Map::writable_slice(GuestOffset guest) {
  const uint64_t l1_index = image_.geometry.l1_index(guest);
  for (;;) {
    IMG_LET(const L1Entry l1, l1_entry(guest));
    if (!l1.present() || !l1.copied()) {
      IMG_TRY(make_table(l1_index));
      continue;
    }
    IMG_LET(TableCache::Pin slice, load_slice(l1, guest));
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
    IMG_TRY(image_.storage.write_zeroes(table));  // few hosts write them as bytes
  }
  image_.tables.drop(table);

  ExclusiveLock lock(image_.mutex);
  l1_[l1_index] = L1Entry::of(table.begin).raw;
  dirty_l1_.push_back(l1_index);
  if (old.present() || !cluster.blank()) image_.shows_bytes = true;
  image_.known.add(g.cluster_of(table.begin));
  cluster.commit();
  if (old.present()) {
    image_.known.remove(g.cluster_of(old.table()));
    allocator_.quarantine(old.table(), 1, HostSpace::keep);
  }
  return {};
}

/// Drops one reference of everything that the entry points at in the image file.
void Map::give_up(L2Entry entry, HostSpace space) {
  const Geometry& g = image_.geometry;
  if (g.l2.is_compressed(entry)) {
    const CompressedRange range = entry.compressed_range(g.cluster_bits);
    const uint64_t first = g.cluster_of(range.offset);
    const uint64_t last = g.cluster_of(range.offset + (range.length - 1));
    allocator_.quarantine(g.host_of(first), last - first + 1, space);
  } else if (g.l2.has_host(entry) && !g.l2.data_file) {
    allocator_.quarantine(entry.host(), 1, space);
  }
}

/// `entry_for(old, cluster, subclusters)` gives the new entry of the cluster at a guest offset, of which some
/// subclusters are meant.
template <class Change>
void Map::change(const TableCache::Pin& slice, GuestRange range, HostSpace space, Shows shows, Change&& entry_for) {
  const Geometry& g = image_.geometry;
  const GuestRange clusters = round_out(range, g.cluster_size);
  const uint64_t first = g.l2_index(clusters.begin) % g.slice_entries();
  const uint64_t count = clusters.length >> g.cluster_bits;
  assert(first + count <= g.slice_entries());

  ExclusiveLock lock(image_.mutex);
  if (shows == Shows::bytes) image_.shows_bytes = true;
  const uint64_t width = g.l2.entry_bytes();
  const Bytes entries = image_.tables.edit(slice, kMapStage, first * width, count * width);
  for (uint64_t i = 0; i < count; ++i) {
    const GuestOffset cluster = clusters.begin + i * g.cluster_size;
    const L2Entry old = g.l2.load(entries, first + i);
    const L2Entry next = entry_for(old, cluster, touched(range, cluster));
    g.l2.store(entries, first + i, next);
    const bool keeps_host = g.l2.has_host(old) && g.l2.has_host(next) && old.host() == next.host();
    if (!keeps_host) give_up(old, space);
    if (cluster.bytes() < counted_)
      allocated_ += (g.l2.holds_host(next) ? g.cluster_size : 0) - (g.l2.holds_host(old) ? g.cluster_size : 0);
  }
}

void Map::link_compressed(const TableCache::Pin& slice, GuestOffset guest, std::span<const CompressedRange> streams) {
  const Geometry& g = image_.geometry;
  change(slice, {guest, streams.size() << g.cluster_bits}, HostSpace::keep, Shows::bytes,
         [&](L2Entry, GuestOffset cluster, uint64_t) {
           return L2Entry::compressed(streams[(cluster - guest) >> g.cluster_bits], g.cluster_bits);
         });
}

void Map::link(const TableCache::Pin& slice, GuestRange range, HostOffset host, Shows shows) {
  const Geometry& g = image_.geometry;
  const uint64_t within = range.begin.bytes() % g.cluster_size;
  change(slice, range, HostSpace::keep, shows, [&](L2Entry old, GuestOffset cluster, uint64_t subclusters) {
    L2Entry next = g.l2.normal(host - within + (cluster - (range.begin - within)));
    if (!g.l2.extended) return next;
    const uint64_t zero = g.l2.is_compressed(old) ? 0 : old.bitmap >> 32 & ~subclusters;
    const bool same_host = g.l2.has_host(old) && old.host() == next.host();
    const uint64_t others = same_host ? old.bitmap & L2Format::kAllSubclusters : 0;
    next.bitmap = zero << 32 | others | subclusters;
    return next;
  });
}

void Map::link_zero(const TableCache::Pin& slice, GuestRange range, HostOffset host) {
  const Geometry& g = image_.geometry;
  // No bytes, but the file has to reach that far.
  change(slice, range, HostSpace::keep, Shows::bytes,
         [&](L2Entry, GuestOffset cluster, uint64_t) { return g.l2.zero_allocated(host + (cluster - range.begin)); });
}

void Map::zero(const TableCache::Pin& slice, GuestRange range, bool keep) {
  const Geometry& g = image_.geometry;
  const uint64_t whole = g.l2.extended ? L2Format::kAllSubclusters : 1;
  change(slice, range, HostSpace::punch, Shows::zeros, [&](L2Entry old, GuestOffset, uint64_t subclusters) {
    const bool keeps = keep && g.l2.has_host(old);
    if (subclusters == whole && !keeps) return g.l2.zero_plain();
    if (!g.l2.extended) return L2Entry{old.raw | kZeroFlag, 0};
    const L2Entry next{old.raw, (old.bitmap & ~subclusters) | subclusters << 32};
    return next.bitmap == whole << 32 && !keeps ? g.l2.zero_plain() : next;
  });
}

void Map::unmap(const TableCache::Pin& slice, GuestRange range) {
  change(slice, range, HostSpace::punch, Shows::zeros, [](L2Entry, GuestOffset, uint64_t) { return L2Entry{}; });
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

void Map::drop_tables_from(uint64_t l1_index) {
  ExclusiveLock lock(image_.mutex);
  for (; l1_index < l1_.size(); ++l1_index) {
    const L1Entry entry{l1_[l1_index]};
    if (!entry.present()) continue;
    image_.known.remove(image_.geometry.cluster_of(entry.table()));
    allocator_.quarantine(entry.table(), 1, HostSpace::punch);
    l1_[l1_index] = 0;
    dirty_l1_.push_back(l1_index);
  }
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
  IMG_LET(const TableCache::Pin slice, load_slice(l1, next));
  ExclusiveLock lock(image_.mutex);
  if (L1Entry{l1_[g.l1_index(next)]} != l1) return true;  // copied meanwhile: the next call looks again
  const ConstBytes entries = slice.content();
  uint64_t found = 0;
  for (uint64_t i = 0; i < g.slice_entries(); ++i) found += g.l2.holds_host(g.l2.load(entries, i));
  allocated_ += found * g.cluster_size;
  counted_ += g.slice_coverage();
  return true;
}

}  // namespace imgfuse::qcow2
