#include "format/qcow2/tree_change.h"

#include <algorithm>
#include <bit>
#include <numeric>

#include "base/endian.h"
#include "base/math.h"
#include "format/qcow2/cluster_runs.h"
#include "format/qcow2/l2_entry.h"
#include "format/qcow2/table_writer.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint64_t kMaxWindows = 4096;  // the largest images that are used for anything have a few

Error without_count(uint64_t cluster, uint64_t cluster_size) {
  return {ErrorCode::corrupt, fmt::format("the cluster at {:#x} is in use but has no reference count; repair the image "
                                          "with imgfuse check --repair all",
                                          cluster * cluster_size)};
}

}  // namespace

/// Hands reserved clusters out, one by one.
class TreeChange::Supply {
 public:
  Supply(const Reservations& reservations, uint64_t cluster_size)
      : reservations_(reservations), cluster_size_(cluster_size) {}

  HostOffset take() {
    if (used_ == reservations_[at_].clusters()) {
      ++at_;
      used_ = 0;
    }
    return reservations_[at_].host() + used_++ * cluster_size_;
  }

 private:
  const Reservations& reservations_;
  const uint64_t cluster_size_;
  size_t at_ = 0;
  uint64_t used_ = 0;
};

// ---- Examining

Result<> TreeChange::examine() {
  const Geometry& g = image_.geometry;
  blocks_ = refcounts_.table();
  while (!blocks_.empty() && blocks_.back() == 0) blocks_.pop_back();
  block_bits_ = static_cast<unsigned>(std::countr_zero(g.refcounts_per_block));
  IMG_LET(const uint64_t file_size, image_.storage.size());
  end_ = std::min<uint64_t>(g.clusters_for(file_size), blocks_.size() << block_bits_);
  for (const Gain& gain : plan_.gains) IMG_TRY(check_tables(*gain.tree));

  touched_.assign(blocks_.size(), false);
  changed_tables_.assign(plan_.next->size(), false);
  l1_ = *plan_.next;
  if (plan_.flags == Flags::none)
    for (uint64_t& entry : l1_) entry &= ~kCopied;
  return for_each_window([this] { return find_changed_tables(); });
}

/// No table twice in a tree: its references would be counted for as often.
Result<> TreeChange::check_tables(const L1Table& tree) const {
  const Geometry& g = image_.geometry;
  std::vector<uint64_t> tables;
  for (uint64_t i = 0; i < tree.size(); ++i) {
    const L1Entry entry{tree[i]};
    if ((entry.raw & kL1Reserved) || entry.table().bytes() % g.cluster_size != 0)
      return fail(ErrorCode::corrupt, "L1 entry {} is {:#x}, which is no place of a table", i, entry.raw);
    if (!entry.present()) continue;
    if (!may_count(g.cluster_of(entry.table())))
      return fail(without_count(g.cluster_of(entry.table()), g.cluster_size));
    tables.push_back(entry.table().bytes());
  }
  std::sort(tables.begin(), tables.end());
  if (const auto twice = std::adjacent_find(tables.begin(), tables.end()); twice != tables.end())
    return fail(ErrorCode::corrupt, "the cluster at {:#x} is used twice as a table", *twice);
  return {};
}

/// Calls `visit` with each window that has counts loaded into window_.
Result<> TreeChange::for_each_window(const std::function<Result<>()>& visit) {
  const uint64_t blocks_in_window = CountWindow::kClusters >> block_bits_;
  const bool loaded = windows_ == 1;  // still there from the last time
  windows_ = 0;
  for (uint64_t first = 0; first < end_; first += CountWindow::kClusters) {
    const auto from = blocks_.begin() + static_cast<ptrdiff_t>(first >> block_bits_);
    const auto to = blocks_.end() - from > static_cast<ptrdiff_t>(blocks_in_window)
                        ? from + static_cast<ptrdiff_t>(blocks_in_window)
                        : blocks_.end();
    if (std::all_of(from, to, [](uint64_t block) { return block == 0; })) continue;
    if (++windows_ > kMaxWindows)
      return fail(ErrorCode::unsupported, "the reference counts are spread over more than {} windows of {} clusters",
                  kMaxWindows, CountWindow::kClusters);
    if (!loaded) IMG_TRY(load_window(first));
    IMG_TRY(visit());
  }
  return {};
}

Result<> TreeChange::load_window(uint64_t first) {
  window_.open(first, std::min(CountWindow::kClusters, end_ - first));
  {
    SharedLock lock(image_.mutex);
    image_.known.for_each(first, window_.end(), [this](uint64_t cluster) { window_.set_metadata(cluster); });
  }
  allocated_clusters_ = 0;
  for (const Gain& gain : plan_.gains) IMG_TRY(add_tree(gain));
  return check_counts();
}

Result<> TreeChange::add_tree(const Gain& gain) {
  const Geometry& g = image_.geometry;
  const L1Table& tree = *gain.tree;
  const auto place = [&](uint64_t i) { return L1Entry{tree[i]}.table().bytes(); };
  for (uint64_t i = 0; i < tree.size(); ++i)
    if (place(i) != 0) IMG_TRY(add(place(i) >> g.cluster_bits, gain.references));
  return for_each_cluster(image_.storage, g.cluster_size, 0, tree.size(), Holes::skip, place,
                          [&](uint64_t i, ConstBytes table) { return add_table(gain, i, table); });
}

Result<> TreeChange::add_table(const Gain& gain, uint64_t l1_index, ConstBytes table) {
  const Geometry& g = image_.geometry;
  const bool next = gain.tree == plan_.next;
  uint64_t held = 0;
  uint64_t flags = 0;
  for (uint64_t i = 0; i < g.l2_entries; ++i) {
    const L2Entry entry = g.l2.load(table, i);
    if (!g.l2.holds_host(entry)) continue;
    ++held;
    flags |= entry.raw & kCopied;
    IMG_TRY(add_entry(gain, entry, GuestOffset(l1_index * g.l2_coverage + i * g.cluster_size)));
  }
  if (!next) return {};
  allocated_clusters_ += held;
  if (flags != 0 && plan_.flags == Flags::none) changed_tables_[l1_index] = true;
  return {};
}

Result<> TreeChange::add_entry(const Gain& gain, L2Entry entry, GuestOffset guest) {
  const Geometry& g = image_.geometry;
  HostRange range{entry.host(), 1};
  if (g.l2.is_compressed(entry)) {
    const CompressedRange compressed = entry.compressed_range(g.cluster_bits);
    range = {compressed.offset, compressed.length};
  } else if (entry.host().bytes() % g.cluster_size != 0) {
    return fail(ErrorCode::corrupt, "L2 entry {:#x} for guest offset {:#x} points into the middle of a cluster",
                entry.raw, guest.bytes());
  }
  const uint64_t last = g.cluster_of(range.begin + (range.length - 1));
  for (uint64_t cluster = g.cluster_of(range.begin); cluster <= last; ++cluster) {
    if (window_.contains(cluster) && window_.is_metadata(cluster))
      return fail(ErrorCode::corrupt, "L2 entry {:#x} for guest offset {:#x} points at metadata", entry.raw,
                  guest.bytes());
    IMG_TRY(add(cluster, gain.references));
  }
  return {};
}

Result<> TreeChange::add(uint64_t cluster, int32_t references) {
  if (!may_count(cluster)) return fail(without_count(cluster, image_.geometry.cluster_size));
  if (window_.contains(cluster) && !window_.add(cluster, references))
    return fail(ErrorCode::corrupt, "the cluster at {:#x} has more than 2^31 references",
                cluster << image_.geometry.cluster_bits);
  return {};
}

/// Compares the window with what is counted, and notes which blocks change.
Result<> TreeChange::check_counts() {
  const Geometry& g = image_.geometry;
  const uint64_t first_block = window_.first() >> block_bits_;
  const uint64_t end_block = divide_up(window_.end(), g.refcounts_per_block);
  const auto end_of = [&](uint64_t block) { return std::min((block + 1) << block_bits_, window_.end()); };
  for (uint64_t block = first_block; block < end_block; ++block)
    for (uint64_t c = block << block_bits_; c < end_of(block) && !touched_[block]; ++c)
      if (window_.sum(c) != 0) touched_[block] = true;

  return for_each_cluster(
      image_.storage, g.cluster_size, first_block, end_block, Holes::show,
      [&](uint64_t block) { return touched_place(block); },
      [&](uint64_t block, ConstBytes counts) -> Result<> {
        for (uint64_t c = block << block_bits_; c < end_of(block); ++c)
          if (window_.sum(c) != 0)
            IMG_TRY(check_count(c, get_refcount(counts, c - (block << block_bits_), g.refcount_bits)));
        return {};
      });
}

Result<> TreeChange::check_count(uint64_t cluster, uint64_t count) {
  const Geometry& g = image_.geometry;
  const int64_t sum = window_.sum(cluster);
  if (count == 0) return fail(without_count(cluster, g.cluster_size));
  if (sum < 0 && static_cast<uint64_t>(-sum) > count)
    return fail(ErrorCode::corrupt,
                "the cluster at {:#x} has a reference count of {} but {} references; repair the image with imgfuse "
                "check --repair all",
                cluster * g.cluster_size, count, -sum);
  const uint64_t max = ~uint64_t{0} >> (64 - g.refcount_bits);
  if (sum > 0 && static_cast<uint64_t>(sum) > max - count)
    return fail(ErrorCode::unsupported,
                "the cluster at {:#x} would have {} references, and counts of {} bits end at {}; copy the disk to an "
                "image with wider counts",
                cluster * g.cluster_size, count + static_cast<uint64_t>(sum), g.refcount_bits, max);
  window_.set_unshared(cluster, static_cast<int64_t>(count) + sum == 1);
  return {};
}

bool TreeChange::flag_for(L2Entry entry) const {
  const uint64_t cluster = image_.geometry.cluster_of(entry.host());
  const bool counted_here = window_.contains(cluster) && window_.sum(cluster) != 0;
  return counted_here ? window_.unshared(cluster) : (entry.raw & kCopied) != 0;
}

/// Of the next tree, where the flags are to follow the counts: tables and L1 entries whose flags do so no longer.
Result<> TreeChange::find_changed_tables() {
  if (plan_.flags == Flags::none) return {};
  const Geometry& g = image_.geometry;
  const auto place = [&](uint64_t i) { return L1Entry{l1_[i]}.table().bytes(); };
  for (uint64_t i = 0; i < l1_.size(); ++i)
    if (place(i) != 0) l1_[i] = (l1_[i] & ~kCopied) | (flag_for({place(i) | (l1_[i] & kCopied)}) ? kCopied : 0);
  return for_each_cluster(image_.storage, g.cluster_size, 0, l1_.size(), Holes::skip, place,
                          [&](uint64_t index, ConstBytes table) -> Result<> {
                            for (uint64_t i = 0; i < g.l2_entries && !changed_tables_[index]; ++i) {
                              const L2Entry entry = g.l2.load(table, i);
                              if (g.l2.has_host(entry) && flag_for(entry) != ((entry.raw & kCopied) != 0))
                                changed_tables_[index] = true;
                            }
                            return {};
                          });
}

// ---- Reserving

Result<> TreeChange::reserve() {
  const Geometry& g = image_.geometry;
  // A copy takes the place of its table, which loses a reference.
  for (uint64_t i = 0; i < l1_.size(); ++i)
    if (changed_tables_[i]) touch(g.cluster_of(L1Entry{l1_[i]}.table()));
  uint64_t missing = static_cast<uint64_t>(std::count(changed_tables_.begin(), changed_tables_.end(), true) +
                                           std::count(touched_.begin(), touched_.end(), true));
  while (missing > 0) {
    IMG_LET(Reservation next, allocator_.reserve(missing));
    missing -= next.clusters();
    copies_.push_back(std::move(next));
  }
  IMG_LET(l1_place_, reserve_run(g.clusters_for(l1_.size() * 8)));
  IMG_LET(snapshot_table_place_, reserve_run(g.clusters_for(plan_.snapshot_table_bytes)));
  do {  // the table may grow while a place for it is sought
    refcount_table_clusters_ = g.clusters_for(refcounts_.table().size() * 8);
    IMG_LET(refcount_table_place_, reserve_run(refcount_table_clusters_));
  } while (g.clusters_for(refcounts_.table().size() * 8) != refcount_table_clusters_);
  return {};
}

Result<TreeChange::Reservations> TreeChange::reserve_run(uint64_t clusters) {
  if (clusters > 1) return allocator_.reserve_contiguous(clusters);
  Reservations one;
  if (clusters == 0) return one;
  IMG_LET(Reservation cluster, allocator_.reserve(1));
  one.push_back(std::move(cluster));
  return one;
}

// ---- Writing

Result<> TreeChange::write() {
  const Geometry& g = image_.geometry;
  refcount_table_ = refcounts_.table();
  Supply supply(copies_, g.cluster_size);
  for (uint64_t i = 0; i < l1_.size(); ++i)
    if (changed_tables_[i]) l1_[i] = supply.take().bytes() | kCopied;
  for (uint64_t block = 0; block < blocks_.size(); ++block)
    if (touched_[block]) refcount_table_[block] = supply.take().bytes();
  for (const Reservation& copy : copies_) image_.tables.drop({copy.host(), copy.clusters() << g.cluster_bits});

  bool first = true;
  const Result<> written = for_each_window([&]() -> Result<> {
    IMG_TRY(write_blocks());
    return write_tables(std::exchange(first, false));
  });
  if (!written) return written;
  IMG_TRY(write_table(l1_offset(), l1_));
  return write_table(refcount_table_offset(), refcount_table_);
}

/// The blocks of the window that change, at their new places.
Result<> TreeChange::write_blocks() {
  const Geometry& g = image_.geometry;
  for (uint64_t i = 0; i < l1_.size(); ++i)
    if (const uint64_t old = g.cluster_of(L1Entry{(*plan_.next)[i]}.table());
        changed_tables_[i] && window_.contains(old))
      (void)window_.add(old, -1);

  ClusterWriter writer(image_.storage, g.cluster_size);
  IMG_TRY(for_each_cluster(
      image_.storage, g.cluster_size, window_.first() >> block_bits_, divide_up(window_.end(), g.refcounts_per_block),
      Holes::show, [&](uint64_t block) { return touched_place(block); },
      [&](uint64_t block, ConstBytes counts) -> Result<> {
        IMG_LET(const Bytes copy, writer.next(HostOffset(refcount_table_[block])));
        std::copy(counts.begin(), counts.end(), copy.begin());
        const uint64_t first = block << block_bits_;
        const uint64_t end = std::min(first + g.refcounts_per_block, window_.end());
        for (uint64_t c = first; c < end; ++c)
          if (const int64_t sum = window_.sum(c); sum != 0)
            set_refcount(copy, c - first, g.refcount_bits,
                         get_refcount(counts, c - first, g.refcount_bits) + static_cast<uint64_t>(sum));
        return {};
      }));
  return writer.finish();
}

/// The tables that change, with the flags that the window decides on. The first window makes the copies.
Result<> TreeChange::write_tables(bool first) {
  if (plan_.flags == Flags::none && !first) return {};
  const Geometry& g = image_.geometry;
  const L1Table& from = first ? *plan_.next : l1_;
  ClusterWriter writer(image_.storage, g.cluster_size);
  IMG_TRY(for_each_cluster(
      image_.storage, g.cluster_size, 0, l1_.size(), Holes::show,
      [&](uint64_t i) { return changed_tables_[i] ? L1Entry{from[i]}.table().bytes() : 0; },
      [&](uint64_t i, ConstBytes table) -> Result<> {
        IMG_LET(const Bytes copy, writer.next(L1Entry{l1_[i]}.table()));
        std::copy(table.begin(), table.end(), copy.begin());
        for (uint64_t k = 0; k < g.l2_entries; ++k) {
          L2Entry entry = g.l2.load(table, k);
          if (!g.l2.has_host(entry)) continue;
          const bool flag = plan_.flags == Flags::recount && flag_for(entry);
          entry.raw = (entry.raw & ~kCopied) | (flag ? kCopied : 0);
          g.l2.store(copy, k, entry);
        }
        return {};
      }));
  return writer.finish();
}

/// The table, and zeros to the end of its last cluster.
Result<> TreeChange::write_table(HostOffset offset, const std::vector<uint64_t>& entries) {
  const uint64_t whole = image_.geometry.clusters_for(entries.size() * 8) * image_.geometry.cluster_size / 8;
  image_.tables.drop({offset, whole * 8});
  TableWriter writer(image_.storage, offset);
  for (const uint64_t entry : entries) IMG_TRY(writer.entry(entry));
  for (uint64_t i = entries.size(); i < whole; ++i) IMG_TRY(writer.entry(0));
  return writer.finish();
}

// ---- Behind the switch

Result<> TreeChange::punch() {
  const Geometry& g = image_.geometry;
  Buffer counts(g.cluster_size);
  return for_each_cluster(
      image_.storage, g.cluster_size, 0, blocks_.size(), Holes::show,
      [&](uint64_t block) { return touched_place(block); },
      [&](uint64_t block, ConstBytes old) -> Result<> {
        IMG_TRY(image_.storage.read(HostOffset(refcount_table_[block]), counts.bytes()));
        const uint64_t first = block << block_bits_;
        const auto freed = [&](uint64_t i) {
          return get_refcount(old, i, g.refcount_bits) != 0 && get_refcount(counts.bytes(), i, g.refcount_bits) == 0;
        };
        for (uint64_t i = 0; i < g.refcounts_per_block; ++i) {
          uint64_t end = i;
          while (end < g.refcounts_per_block && freed(end)) ++end;
          if (end > i) (void)image_.storage.discard({g.host_of(first + i), (end - i) << g.cluster_bits});
          i = std::max(i, end);
        }
        return {};
      });
}

void TreeChange::adopt() {
  const Geometry& g = image_.geometry;
  for (uint64_t block = 0; block < blocks_.size(); ++block)
    if (touched_[block]) allocator_.quarantine(HostOffset(blocks_[block]), 1, HostSpace::keep);
  const HostRange old = refcounts_.adopt_table(refcount_table_offset(), std::move(refcount_table_));
  allocator_.quarantine(old.begin, g.clusters_for(old.length), HostSpace::keep);
  allocator_.search_from_start();
}

void TreeChange::commit() {
  for (Reservations* reservations : {&copies_, &l1_place_, &snapshot_table_place_, &refcount_table_place_})
    for (Reservation& reservation : *reservations) reservation.commit();
}

}  // namespace imgfuse::qcow2
