// What is done ahead of need, so that a flush cycle takes one barrier: the file is longer than it has to be, and
// clusters at its end are counted that nothing points at (FORMAT.md, "Counts ahead").
#include <algorithm>

#include "format/qcow2/allocator.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint64_t kAhead = uint64_t{64} << 20;  // bytes

}  // namespace

// ---- The file's length

void Allocator::stay_ahead() {
  Lock searching(search_);
  ahead_ = image_.storage.info().extensible;
}

void Allocator::durable_to(uint64_t file_size) {
  ExclusiveLock lock(image_.mutex);
  durable_end_ = std::max(durable_end_, image_.geometry.cluster_of(HostOffset(file_size)));
}

/// Nobody can have a cluster past the new end meanwhile, so no write is cut off. What fails here only costs flushes.
void Allocator::extend(uint64_t end) {
  const Geometry& g = image_.geometry;
  const uint64_t ahead = g.clusters_for(kAhead);
  if (end + ahead / 2 < extended_to_) return;
  const uint64_t limit = kMaxHostOffset >> g.cluster_bits;
  const Result<uint64_t> size = image_.storage.size();
  const uint64_t target = end + ahead;
  ahead_ = size && target < limit;
  if (!ahead_) return;
  if (g.clusters_for(*size) < target) {
    ahead_ = image_.storage.resize(g.host_of(target).bytes()).has_value();
    if (!ahead_) return;
  }
  extended_to_ = target;
}

Result<> Allocator::cut_ahead() {
  Lock searching(search_);
  if (std::exchange(extended_to_, 0) == 0) return {};
  ahead_ = false;
  uint64_t end = 0;
  {
    SharedLock lock(image_.mutex);
    end = image_.geometry.host_of(fresh_from_).bytes();
  }
  IMG_LET(const uint64_t size, image_.storage.size());
  return end < size ? image_.storage.resize(end) : Result<>{};
}

// ---- Counts

void Allocator::pause_counts_ahead() {
  Lock searching(search_);
  ++paused_;
}

void Allocator::resume_counts_ahead() {
  Lock searching(search_);
  --paused_;
}

/// What a flush before the next cycle can count: clusters that are in the file already, whatever a crash leaves. Behind
/// what is counted ahead now, if that is running out.
Allocator::Run Allocator::countable() {
  ExclusiveLock lock(image_.mutex);
  // Not before the first cycle that allocates: most images that are written a little never see a second one.
  const bool allocates = image_.counts_first || !counted_.empty();
  const bool first_time = allocates && !std::exchange(has_allocated_, true);
  const bool enough = counted_.count() > image_.geometry.clusters_for(kAhead) / 2;
  const bool apart = !counted_.empty() && counted_.end != fresh_from_;
  if (!allocates || first_time || enough || apart || !counting_.empty() || fresh_from_ >= durable_end_) return {};
  return {fresh_from_, durable_end_};
}

bool Allocator::may_count_ahead() {
  Lock searching(search_);
  return ahead_ && paused_ == 0;
}

/// The mark is made without search_: nobody who allocates waits for its flush.
void Allocator::count_ahead() {
  if (countable().empty() || !may_count_ahead()) return;
  const Result<> marked = image_.header_writer.set_counts_ahead(true);
  if (!marked && marked.error().code() != ErrorCode::no_space) latch_.set(marked.error());
  Lock searching(search_);
  if (!ahead_ || paused_ > 0) return;
  ahead_ = marked && count_run(countable());  // without it, cycles only take longer
}

Result<> Allocator::count_run(const Run run) {
  for (uint64_t at = run.first; at < run.end;) {
    IMG_LET(const Refcounts::Slice slice, refcounts_.slice_of(at));
    if (!slice.pin) {
      if (at == run.first) IMG_TRY(create_block(at));
      return {};  // the next run begins behind the block
    }
    ExclusiveLock lock(image_.mutex);
    if (fresh_from_ != at) return {};  // somebody took it: Packer needs no search
    for (const uint64_t end = std::min(run.end, slice.first + slice.count); at < end; fresh_from_ = ++at) {
      if (refcounts_.get(slice, at) != 0 || image_.known.overlaps(at)) return {};
      refcounts_.count_ahead(slice, at);
      counting_ = {run.first, at + 1};
    }
  }
  return {};
}

Allocator::Run Allocator::counting() const NO_THREAD_SAFETY_ANALYSIS { return counting_; }

void Allocator::counts_durable(Run run) {
  ExclusiveLock lock(image_.mutex);
  if (run.empty() || counting_.first != run.first || counting_.end < run.end) return;  // given back meanwhile
  counting_.first = run.end;
  if (counted_.empty()) counted_.first = run.first;
  counted_.end = run.end;
}

Result<Reservation> Allocator::take_counted(uint64_t wanted) {
  uint64_t first = 0;
  {
    SharedLock lock(image_.mutex);
    first = counted_.first;
  }
  Reservation found;
  IMG_LET(found.slice_, refcounts_.slice_of(first));
  ExclusiveLock lock(image_.mutex);
  const uint64_t end = std::min({counted_.end, first + wanted, found.slice_.first + found.slice_.count});
  found.allocator_ = this;
  found.host_ = image_.geometry.host_of(first);
  found.clusters_ = end - first;
  found.fresh_ = true;
  found.blank_ = true;
  counted_.first = end;
  return found;
}

Result<> Allocator::give_back_counts() {
  Lock searching(search_);
  Run runs[2];
  {
    ExclusiveLock lock(image_.mutex);
    runs[0] = std::exchange(counting_, {});  // the later one
    runs[1] = std::exchange(counted_, {});
  }
  for (const Run& run : runs)
    for (uint64_t end = run.end; end > run.first;) {
      IMG_LET(const Refcounts::Slice slice, refcounts_.slice_of(end - 1));
      const uint64_t first = std::max(run.first, slice.first);
      ExclusiveLock lock(image_.mutex);
      for (uint64_t cluster = first; cluster < end; ++cluster) refcounts_.set(slice, cluster, 0);
      lowest_free_ = std::min(lowest_free_, first);
      if (fresh_from_ == end) fresh_from_ = first;
      end = first;
    }
  return {};
}

}  // namespace imgfuse::qcow2
