#include "format/qcow2/allocator.h"

#include <algorithm>
#include <cassert>

#include "format/qcow2/l2_entry.h"

namespace imgfuse::qcow2 {
namespace {

// Past either, a request asks for a flush cycle: the list shall not grow without bound, nor the file.
constexpr size_t kMaxQuarantine = 65536;  // runs
constexpr uint64_t kMaxQuarantineBytes = uint64_t{256} << 20;

}  // namespace

Reservation& Reservation::operator=(Reservation&& other) noexcept {
  std::swap(allocator_, other.allocator_);
  std::swap(slice_, other.slice_);
  std::swap(host_, other.host_);
  std::swap(clusters_, other.clusters_);
  std::swap(fresh_, other.fresh_);
  std::swap(blank_, other.blank_);
  return *this;
}

Reservation::~Reservation() {
  if (allocator_) allocator_->cancel(*this);
}

void Allocator::start(uint64_t file_size) {
  ExclusiveLock lock(image_.mutex);
  fresh_from_ = image_.storage.info().extensible ? image_.geometry.clusters_for(file_size) : ~uint64_t{0};
}

Result<Reservation> Allocator::reserve(uint64_t wanted) {
  Lock searching(search_);
  IMG_LET(const uint64_t limit, end_limit());
  uint64_t from = 0;
  Run counted;
  {
    SharedLock lock(image_.mutex);
    from = lowest_free_;
    counted = counted_;
  }
  // What was freed comes first, so that the file does not grow while it has room.
  IMG_LET(Reservation found, search(from, wanted, counted.empty() ? limit : counted.first));
  if (found.clusters() == 0 && !counted.empty()) {
    IMG_LET(found, take_counted(wanted));
  }
  if (found.clusters() == 0) return no_cluster_below(limit);
  if (ahead_) extend(image_.geometry.cluster_of(found.host()) + found.clusters());
  return found;
}

Result<bool> Allocator::drop_empty_blocks() {
  Lock searching(search_);
  Result<std::vector<uint64_t>> blocks = refcounts_.drop_empty_end();
  if (!blocks) {
    latch_.set(blocks.error());  // either entry may be the durable one
    return fail(std::move(blocks).error());
  }
  ExclusiveLock lock(image_.mutex);
  for (const uint64_t block : *blocks) quarantine(image_.geometry.host_of(block), 1, HostSpace::punch);
  return !blocks->empty();
}

Result<> Allocator::cut_end() {
  if (!image_.storage.info().extensible) return {};
  Lock searching(search_);
  IMG_LET(const uint64_t end, refcounts_.end_of_counted());
  IMG_LET(const uint64_t size, image_.storage.size());
  if (image_.geometry.clusters_for(size) <= end) return {};
  {
    ExclusiveLock lock(image_.mutex);
    if (image_.known.overlaps(end, image_.geometry.clusters_for(size) - end)) return {};  // metadata without a count
    durable_end_ = std::min(durable_end_, end);
  }
  extended_to_ = std::min(extended_to_, end);
  if (!image_.storage.resize(image_.geometry.host_of(end).bytes())) return {};  // it only takes space
  Result<> durable = image_.storage.flush();  // what is written there later must not meet what was cut off
  if (!durable) {
    latch_.set(durable.error());
    return durable;
  }
  ExclusiveLock lock(image_.mutex);
  fresh_from_ = std::min(fresh_from_, end);
  return {};
}

/// Goes through the counts slice by slice, and makes the block for the first region that has none. Nothing if there is
/// nothing free below `limit`.
Result<Reservation> Allocator::search(uint64_t from, uint64_t wanted, uint64_t limit) {
  for (uint64_t at = from; at < limit;) {
    IMG_LET(Refcounts::Slice slice, refcounts_.slice_of(at));
    if (!slice.pin) {
      IMG_TRY(create_block(at));
      continue;
    }
    IMG_LET(Reservation found, try_slice(slice, at, wanted, limit));
    if (found.clusters() > 0) {
      found.slice_ = std::move(slice);  // its pin: giving the clusters back must not need I/O
      return found;
    }
    at = slice.first + slice.count;
  }
  return Reservation();
}

tl::unexpected<Error> Allocator::no_cluster_below(uint64_t limit) const {
  return fail(ErrorCode::no_space, "no cluster is free below the largest host offset, {:#x}",
              limit << image_.geometry.cluster_bits);
}

Result<Reservation> Allocator::try_slice(const Refcounts::Slice& slice, uint64_t from, uint64_t wanted,
                                         uint64_t limit) {
  ExclusiveLock lock(image_.mutex);
  const uint64_t slice_end = slice.first + slice.count;
  uint64_t first = std::max(from, slice.first);
  first = refcounts_.first_free(slice, first);
  if (from <= lowest_free_) lowest_free_ = std::max(lowest_free_, first);
  uint64_t end = first;
  while (end < std::min(slice_end, limit) && end - first < wanted && refcounts_.get(slice, end) == 0) ++end;

  Reservation found;
  if (first >= end) return found;
  if (image_.known.overlaps(first, end - first))
    return fail(
        ErrorCode::corrupt,
        "clusters {:#x} to {:#x} hold metadata but have no reference count; repair the image with imgfuse check "
        "--repair all",
        first, end);
  for (uint64_t cluster = first; cluster < end; ++cluster) refcounts_.set(slice, cluster, 1);
  if (first == lowest_free_) lowest_free_ = end;
  found.allocator_ = this;
  found.host_ = image_.geometry.host_of(first);
  found.clusters_ = end - first;
  found.fresh_ = first >= fresh_from_;
  found.blank_ = found.fresh_ && end <= durable_end_;
  fresh_from_ = std::max(fresh_from_, end);
  return found;
}

Result<std::vector<Reservation>> Allocator::reserve_contiguous(uint64_t count) {
  Lock searching(search_);
  uint64_t at = 0;
  {
    SharedLock lock(image_.mutex);
    at = image_.storage.info().extensible ? fresh_from_ : lowest_free_;
  }
  IMG_LET(const uint64_t limit, end_limit());
  if (count > refcounts_.longest_run()) {
    IMG_LET(at, make_blocks([&] { return refcounts_.make_room(at, count, limit); }));
  }
  std::vector<Reservation> run;
  for (uint64_t have = 0; have < count;) {
    IMG_LET(Reservation next, search(at, count - have, limit));
    if (next.clusters() == 0) return no_cluster_below(limit);
    const uint64_t first = image_.geometry.cluster_of(next.host());
    if (have > 0 && first != at) {  // something lies in between: start behind it
      run.clear();
      have = 0;
    }
    have += next.clusters();
    at = first + next.clusters();
    run.push_back(std::move(next));
  }
  if (ahead_) extend(at);
  return run;
}

Result<uint64_t> Allocator::create_block(uint64_t cluster) {
  return make_blocks([&] { return refcounts_.create_block(cluster); });
}

/// `make` writes refcount blocks and returns the end of what it wrote to.
template <class Make>
Result<uint64_t> Allocator::make_blocks(Make make) {
  Result<uint64_t> end = make();
  if (!end) {
    if (end.error().code() == ErrorCode::io) latch_.set(end.error());
    return end;
  }
  std::vector<HostRange> replaced = refcounts_.take_replaced_tables();
  ExclusiveLock lock(image_.mutex);
  fresh_from_ = std::max(fresh_from_, *end);
  for (HostRange table : replaced) quarantine(table.begin, image_.geometry.clusters_for(table.length), HostSpace::keep);
  return end;
}

bool Allocator::take(const Refcounts::Slice& slice, uint64_t cluster, uint64_t limit) NO_THREAD_SAFETY_ANALYSIS {
  if (cluster >= limit || refcounts_.get(slice, cluster) != 0 || image_.known.overlaps(cluster)) return false;
  refcounts_.set(slice, cluster, 1);
  fresh_from_ = std::max(fresh_from_, cluster + 1);
  return true;
}

void Allocator::cancel(const Refcounts::Slice& slice, uint64_t cluster) NO_THREAD_SAFETY_ANALYSIS {
  lower(slice, cluster);
}

/// Drops one reference; the cluster may be found again when it was the last.
void Allocator::lower(const Refcounts::Slice& slice, uint64_t cluster) {
  const uint64_t count = refcounts_.get(slice, cluster);
  if (count > 0) refcounts_.set(slice, cluster, count - 1);
  if (count > 1) return;
  lowest_free_ = std::min(lowest_free_, cluster);
  fresh_from_ = std::max(fresh_from_, cluster + 1);  // also where a foreign entry pointed past the file's end
  image_.inflated.drop({image_.geometry.host_of(cluster), image_.geometry.cluster_size});
  if (image_.geometry.cluster_of(image_.next_packed) == cluster) image_.next_packed = HostOffset(0);
}

Result<uint64_t> Allocator::end_limit() {
  const uint64_t largest = kMaxHostOffset >> image_.geometry.cluster_bits;
  if (image_.storage.info().extensible) return largest;
  IMG_LET(const uint64_t size, image_.storage.size());
  return std::min(largest, size >> image_.geometry.cluster_bits);
}

/// The clusters were never reachable, so they are free at once.
void Allocator::cancel(Reservation& reservation) {
  ExclusiveLock lock(image_.mutex);
  const uint64_t first = image_.geometry.cluster_of(reservation.host_);
  for (uint64_t i = 0; i < reservation.clusters_; ++i) refcounts_.set(reservation.slice_, first + i, 0);
  lowest_free_ = std::min(lowest_free_, first);
}

void Allocator::quarantine(HostOffset host, uint64_t clusters, HostSpace space) NO_THREAD_SAFETY_ANALYSIS {
  const uint64_t first = image_.geometry.cluster_of(host);
  quarantined_ += clusters;
  if (!quarantine_.empty()) {
    FreedClusters& last = quarantine_.back();
    if (last.first + last.count == first && last.space == space) {
      last.count += clusters;
      return;
    }
  }
  quarantine_.push_back({first, clusters, space});
}

void Allocator::search_from_start() NO_THREAD_SAFETY_ANALYSIS { lowest_free_ = 1; }

Allocator::Freed Allocator::take_quarantine() NO_THREAD_SAFETY_ANALYSIS {
  releasing_ = !quarantine_.empty();
  quarantined_ = 0;
  return std::exchange(quarantine_, {});
}

void Allocator::keep(Freed freed) {
  ExclusiveLock lock(image_.mutex);
  quarantine_.insert(quarantine_.end(), freed.begin(), freed.end());
  for (const FreedClusters& run : freed) quarantined_ += run.count;
  releasing_ = false;
}

bool Allocator::wants_flush() const {
  SharedLock lock(image_.mutex);
  return quarantine_.size() > kMaxQuarantine || quarantined_ << image_.geometry.cluster_bits > kMaxQuarantineBytes;
}

bool Allocator::has_quarantine() const {
  SharedLock lock(image_.mutex);
  return !quarantine_.empty() || releasing_;
}

uint64_t Allocator::quarantined() const {
  SharedLock lock(image_.mutex);
  return quarantined_;
}

Result<> Allocator::release(Freed freed) {
  // In host order neighbours are punched together, whatever the order in which they were freed.
  std::sort(freed.begin(), freed.end(),
            [](const FreedClusters& x, const FreedClusters& y) { return x.first < y.first; });
  Freed runs;
  for (const FreedClusters& next : freed) {
    if (!runs.empty() && runs.back().first + runs.back().count == next.first && runs.back().space == next.space) {
      runs.back().count += next.count;
    } else {
      runs.push_back(next);
    }
  }
  for (const FreedClusters& run : runs) {
    const uint64_t end = run.first + run.count;
    for (uint64_t first = run.first; first < end;) {
      // Room::exceed: this runs inside a flush cycle, which cannot wait for another.
      IMG_LET(const Refcounts::Slice slice, refcounts_.slice_of(first, TableCache::Room::exceed));
      const uint64_t slice_end = std::min(end, slice.first + slice.count);
      if (!slice.pin) return fail(ErrorCode::corrupt, "cluster {:#x} is in use but has no reference count", first);

      // Runs of clusters that lose their last reference. Only this thread lowers counts of reachable clusters, and only
      // that of the cluster where the next compressed stream goes may be raised, which is another one from here on: so
      // a count of one stays one until it is lowered.
      uint64_t run_end = first;
      bool last_reference = false;
      {
        ExclusiveLock lock(image_.mutex);
        last_reference = refcounts_.get(slice, first) == 1;
        while (run_end < slice_end && (refcounts_.get(slice, run_end) == 1) == last_reference) ++run_end;
        const uint64_t packed = image_.geometry.cluster_of(image_.next_packed);
        if (last_reference && first <= packed && packed < run_end) image_.next_packed = HostOffset(0);
      }
      if (last_reference && run.space == HostSpace::punch)
        (void)image_.storage.discard(
            {image_.geometry.host_of(first), (run_end - first) << image_.geometry.cluster_bits});

      ExclusiveLock lock(image_.mutex);
      for (uint64_t cluster = first; cluster < run_end; ++cluster) lower(slice, cluster);
      first = run_end;
    }
  }
  ExclusiveLock lock(image_.mutex);
  releasing_ = false;
  return {};
}

}  // namespace imgfuse::qcow2
