#include "format/qcow2/tree_change.h"

#include <algorithm>
#include <bit>
#include <numeric>

#include "base/endian.h"
#include "base/math.h"
#include "format/qcow2/cluster_runs.h"
#include "format/qcow2/l2_entry.h"
#include "format/qcow2/refcount_width.h"
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
    if (!is_counted(g.cluster_of(entry.table())))
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
    if (place(i) != 0) IMG_TRY(add(place(i) >> g.cluster_bits, 1, gain.references));
  return for_each_cluster(image_.storage, g.cluster_size, 0, tree.size(), Holes::skip, place,
                          [&](uint64_t i, ConstBytes table) { return add_table(gain, i, table); });
}

Result<> TreeChange::add_table(const Gain& gain, uint64_t l1_index, ConstBytes table) {
  const Geometry& g = image_.geometry;
  uint64_t held = 0;
  bool flags = false;
  for (uint64_t i = 0; i < g.l2_entries;) {
    const L2Entry first = g.l2.load(table, i);
    if (!g.l2.holds_host(first)) {
      ++i;
      continue;
    }
    const uint64_t run = run_length(table, i, first);
    IMG_TRY(add_run(gain, first, run, GuestOffset(l1_index * g.l2_coverage + i * g.cluster_size)));
    flags |= (first.raw & kCopied) != 0;
    held += run;
    i += run;
  }
  if (gain.tree != plan_.next) return {};
  allocated_clusters_ += held;
  if (flags && plan_.flags == Flags::none) changed_tables_[l1_index] = true;
  return {};
}

/// How many entries from `index` on, of which `first` is the first, lie behind each other on the host.
uint64_t TreeChange::run_length(ConstBytes table, uint64_t index, L2Entry first) const {
  const Geometry& g = image_.geometry;
  if (g.l2.is_compressed(first)) return 1;
  uint64_t end = index + 1;
  for (uint64_t expected = first.raw + g.cluster_size; end < g.l2_entries; ++end, expected += g.cluster_size)
    if (g.l2.load(table, end).raw != expected) break;
  return end - index;
}

Result<> TreeChange::add_run(const Gain& gain, L2Entry first, uint64_t entries, GuestOffset guest) {
  const Geometry& g = image_.geometry;
  uint64_t cluster = g.cluster_of(first.host());
  uint64_t count = entries;
  if (g.l2.is_compressed(first)) {
    const CompressedRange range = first.compressed_range(g.cluster_bits);
    cluster = g.cluster_of(range.offset);
    count = g.cluster_of(range.offset + (range.length - 1)) - cluster + 1;
  } else if (first.host().bytes() % g.cluster_size != 0) {
    return fail(ErrorCode::corrupt, "L2 entry {:#x} for guest offset {:#x} points into the middle of a cluster",
                first.raw, guest.bytes());
  }
  if (window_.has_metadata(cluster, count))
    return fail(ErrorCode::corrupt, "L2 entry {:#x} for guest offset {:#x}, or one behind it, points at metadata",
                first.raw, guest.bytes());
  return add(cluster, count, gain.references);
}

Result<> TreeChange::add(uint64_t cluster, uint64_t count, int32_t references) {
  const uint64_t last = cluster + count - 1;
  for (uint64_t c = cluster; c <= last; c = ((c >> block_bits_) + 1) << block_bits_)
    if (!is_counted(c)) return fail(without_count(c, image_.geometry.cluster_size));
  if (!is_counted(last)) return fail(without_count(last, image_.geometry.cluster_size));
  window_.add(cluster, count, references);
  if (window_.overflowed()) return fail(ErrorCode::corrupt, "a cluster has more than 2^30 references from one tree");
  return {};
}

/// Compares the window with what is counted, and notes which blocks change.
Result<> TreeChange::check_counts() {
  const Geometry& g = image_.geometry;
  const uint64_t first_block = window_.first() >> block_bits_;
  const uint64_t end_block = divide_up(window_.end(), g.refcounts_per_block);
  const auto end_of = [&](uint64_t block) { return std::min((block + 1) << block_bits_, window_.end()); };
  for (uint64_t block = first_block; block < end_block; ++block) {
    if (blocks_[block] == 0) continue;
    for (uint64_t c = block << block_bits_; c < end_of(block) && !touched_[block]; ++c)
      if (window_.sum(c) != 0) touched_[block] = true;
  }

  return for_each_cluster(
      image_.storage, g.cluster_size, first_block, end_block, Holes::show,
      [&](uint64_t block) { return touched_place(block); },
      [&](uint64_t block, ConstBytes counts) { return check_block(block, counts); });
}

Result<> TreeChange::check_block(uint64_t block, ConstBytes counts) {
  const uint64_t first = block << block_bits_;
  const uint64_t end = std::min(first + image_.geometry.refcounts_per_block, window_.end());
  const uint64_t max = ~uint64_t{0} >> (64 - image_.geometry.refcount_bits);
  bool good = true;
  with_refcount_width(image_.geometry.refcount_bits, [&](auto width) {
    for (uint64_t c = first; c < end; ++c) {
      const int64_t sum = window_.sum(c);
      if (sum == 0) continue;
      const uint64_t count = width.get(counts, c - first);
      const uint64_t next = count + static_cast<uint64_t>(sum);
      good &= count != 0 && (sum > 0 ? next <= max && next > count : next < count);
      window_.set_unshared(c, next == 1);
    }
  });
  for (uint64_t c = first; c < end && !good; ++c)
    IMG_TRY(check_count(c, get_refcount(counts, c - first, image_.geometry.refcount_bits)));
  return {};
}

/// Says what is wrong with a count, if anything is.
Result<> TreeChange::check_count(uint64_t cluster, uint64_t count) const {
  const Geometry& g = image_.geometry;
  const int64_t sum = window_.sum(cluster);
  const uint64_t max = ~uint64_t{0} >> (64 - g.refcount_bits);
  if (sum == 0) return {};
  if (count == 0) return fail(without_count(cluster, g.cluster_size));
  if (sum < 0 && static_cast<uint64_t>(-sum) > count)
    return fail(ErrorCode::corrupt,
                "the cluster at {:#x} has a reference count of {} but {} references; repair the image with imgfuse "
                "check --repair all",
                cluster * g.cluster_size, count, -sum);
  if (sum > 0 && static_cast<uint64_t>(sum) > max - count)
    return fail(ErrorCode::unsupported,
                "the cluster at {:#x} would have more than {} references, which is what counts of {} bits end at; copy "
                "the disk to an image with wider counts",
                cluster * g.cluster_size, max, g.refcount_bits);
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
      window_.add(old, 1, -1);

  ClusterWriter writer(image_.storage, g.cluster_size);
  IMG_TRY(for_each_cluster(
      image_.storage, g.cluster_size, window_.first() >> block_bits_, divide_up(window_.end(), g.refcounts_per_block),
      Holes::show, [&](uint64_t block) { return touched_place(block); },
      [&](uint64_t block, ConstBytes counts) -> Result<> {
        IMG_LET(const Bytes copy, writer.next(HostOffset(refcount_table_[block])));
        std::copy(counts.begin(), counts.end(), copy.begin());
        const uint64_t first = block << block_bits_;
        const uint64_t end = std::min(first + g.refcounts_per_block, window_.end());
        with_refcount_width(g.refcount_bits, [&](auto width) {
          for (uint64_t c = first; c < end; ++c)
            if (const int64_t sum = window_.sum(c); sum != 0)
              width.set(copy, c - first, width.get(counts, c - first) + static_cast<uint64_t>(sum));
        });
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
          entry.raw = (entry.raw & ~kCopied) | (plan_.flags == Flags::recount && flag_for(entry) ? kCopied : 0);
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
  const bool frees =
      std::any_of(plan_.gains.begin(), plan_.gains.end(), [](const Gain& gain) { return gain.references < 0; });
  if (frees) allocator_.search_from_start();
}

void TreeChange::commit() {
  for (Reservations* reservations : {&copies_, &l1_place_, &snapshot_table_place_, &refcount_table_place_})
    for (Reservation& reservation : *reservations) reservation.commit();
}

}  // namespace imgfuse::qcow2
