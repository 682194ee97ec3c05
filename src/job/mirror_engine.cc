#include "job/mirror_engine.h"

#include <algorithm>
#include <cassert>

#include "base/math.h"

namespace imgfuse::job {
namespace {

/// However low the rate: times do not overflow so.
constexpr std::chrono::hours kLongestPause(24);

/// So that as many operations as may be in flight find memory, if they can; whole clusters do not come apart.
uint64_t longest_operation(const MirrorShape& shape) {
  const uint64_t unit = shape.smallest_buffer();
  return std::max(unit, round_down(shape.buffer / shape.in_flight, unit)) / shape.granularity;
}

}  // namespace

MirrorEngine::MirrorEngine(const MirrorShape& shape)
    : shape_(shape),
      granules_(divide_up(shape.size, shape.granularity)),
      granules_per_cluster_(shape.whole_clusters > shape.granularity ? shape.whole_clusters / shape.granularity : 0),
      longest_(longest_operation(shape)),
      dirty_(granules_),
      in_flight_(granules_),
      whole_(granules_per_cluster_ > 0 ? divide_up(granules_, granules_per_cluster_) : 0),
      buffer_(round_down(shape.buffer, shape.granularity)),
      pieces_(shape.buffer / shape.granularity),
      operations_(shape.in_flight) {
  assert(shape.buffer >= shape.smallest_buffer() && shape.in_flight > 0);
  for (uint64_t i = 0; i < pieces_.size(); ++i) {
    pieces_[i].memory = buffer_.data() + i * shape_.granularity;
    free_.push_back(pieces_[i]);
  }
  for (Operation& operation : operations_) idle_.push_back(operation);
}

MirrorEngine::Granules MirrorEngine::touched(GuestRange range) const {
  return {range.begin.bytes() / shape_.granularity, divide_up(range.end().bytes(), shape_.granularity)};
}

GuestRange MirrorEngine::range_of(Granules granules) const {
  const GuestOffset begin(granules.begin * shape_.granularity);
  return {begin, std::min(granules.end * shape_.granularity, shape_.size) - begin.bytes()};
}

void MirrorEngine::mark(GuestRange range) {
  const Granules granules = touched(range);
  dirty_.set(granules.begin, granules.end);
}

void MirrorEngine::unmark(GuestRange range) {
  const uint64_t begin = divide_up(range.begin.bytes(), shape_.granularity);
  const bool at_end = range.end().bytes() == shape_.size;
  const uint64_t end = at_end ? granules_ : range.end().bytes() / shape_.granularity;
  if (begin < end) dirty_.clear(begin, end);
}

/// Dirty granules side by side that are not on their way, up to the length of an operation. Empty if [from, to) has
/// none.
MirrorEngine::Granules MirrorEngine::next_run(uint64_t from, uint64_t to) const {
  uint64_t begin = dirty_.next_set(from, to);
  while (begin < to && in_flight_.test(begin)) begin = dirty_.next_set(in_flight_.next_clear(begin, to), to);
  const uint64_t cut = std::min(to, round_down(begin, longest_) + longest_);
  return {begin, in_flight_.next_set(begin, dirty_.next_clear(begin, cut))};
}

MirrorEngine::Granules MirrorEngine::widen(Granules run) const {
  if (granules_per_cluster_ == 0) return run;
  if (!whole_.test(cluster_of(run.begin))) run.begin = round_down(run.begin, granules_per_cluster_);
  if (!whole_.test(cluster_of(run.end - 1))) run.end = std::min(granules_, round_up(run.end, granules_per_cluster_));
  return run;
}

/// Behind the cursor, or else from the front: an operation on its way keeps only its own granules waiting.
bool MirrorEngine::find_run(Granules& run) const {
  uint64_t from = cursor_;
  for (bool wrapped = false;;) {
    run = next_run(from, granules_);
    if (run.begin >= granules_) {
      if (wrapped) return false;
      wrapped = true;
      from = 0;
      continue;
    }
    if (wrapped && run.begin >= cursor_) return false;
    from = run.end;
    run = widen(run);
    if (!in_flight_.any(run.begin, run.end)) return true;
  }
}

MirrorEngine::Operation* MirrorEngine::start(Time now) {
  if (paused_ || idle_.empty() || now < wake_at()) return nullptr;
  Granules run;
  if (!find_run(run)) return nullptr;
  return run.end - run.begin <= free_.size() ? begin(run, now) : nullptr;
}

MirrorEngine::Claim MirrorEngine::claim(GuestRange range, Time now) {
  const Granules wanted = touched(range);
  Granules run = next_run(wanted.begin, wanted.end);
  if (run.begin >= wanted.end) return {nullptr, in_flight_.any(wanted.begin, wanted.end)};
  run = widen(run);
  const bool possible = !idle_.empty() && run.end - run.begin <= free_.size() && !in_flight_.any(run.begin, run.end);
  return possible ? Claim{begin(run, now), false} : Claim{nullptr, true};
}

MirrorEngine::Operation* MirrorEngine::begin(Granules run, Time now) {
  dirty_.clear(run.begin, run.end);
  in_flight_.set(run.begin, run.end);
  cursor_ = run.end;
  Operation& operation = idle_.front();
  idle_.pop_front();
  operation.range_ = range_of(run);
  take_memory(operation, run.end - run.begin);
  ++running_;
  on_their_way_ += operation.range_.length;
  if (rate_ > 0) {
    const std::chrono::duration<double> whole(static_cast<double>(operation.range_.length) /
                                              static_cast<double>(rate_));
    const auto pause =
        std::chrono::duration_cast<Time::duration>(std::min<std::chrono::duration<double>>(whole, kLongestPause));
    allowed_at_ = std::min(std::max(allowed_at_, now) + pause, now + kLongestPause);
  }
  return &operation;
}

void MirrorEngine::take_memory(Operation& operation, uint64_t pieces) {
  operation.memory_.clear();
  for (; pieces > 0; --pieces) {
    Piece& piece = free_.front();
    free_.pop_front();
    operation.pieces_.push_back(piece);
    auto& runs = operation.memory_;
    if (!runs.empty() && runs.back().data() + runs.back().size() == piece.memory)
      runs.back() = {runs.back().data(), runs.back().size() + shape_.granularity};
    else
      runs.emplace_back(piece.memory, shape_.granularity);
  }
}

void MirrorEngine::finished(Operation& operation, bool copied) {
  const Granules granules = touched(operation.range_);
  in_flight_.clear(granules.begin, granules.end);
  if (copied) {
    remember_clusters(operation.range_);
    copied_ += operation.range_.length;
  } else {
    dirty_.set(granules.begin, granules.end);
  }
  free_.merge(operation.pieces_, [](const Piece& a, const Piece& b) { return a.memory < b.memory; });
  idle_.push_back(operation);
  --running_;
  on_their_way_ -= operation.range_.length;
}

void MirrorEngine::remember_clusters(GuestRange range) {
  if (granules_per_cluster_ == 0) return;
  const uint64_t first = divide_up(range.begin.bytes(), shape_.whole_clusters);
  const bool at_end = range.end().bytes() == shape_.size;
  const uint64_t end = at_end ? whole_.size() : range.end().bytes() / shape_.whole_clusters;
  if (first < end) whole_.set(first, end);
}

uint64_t MirrorEngine::remaining() const {
  const uint64_t dirty = dirty_.count() * shape_.granularity;
  const bool last = granules_ > 0 && dirty_.test(granules_ - 1);
  return dirty - (last ? granules_ * shape_.granularity - shape_.size : 0) + on_their_way_;
}

MirrorEngine::Entry MirrorEngine::enter(GuestRange range) {
  const Granules granules = touched(range);
  if (in_flight_.any(granules.begin, granules.end)) return Entry::wait;
  if (paused_) return Entry::mark;
  if (granules_per_cluster_ > 0 && !whole_.all(cluster_of(granules.begin), cluster_of(granules.end - 1) + 1))
    return Entry::mark;
  in_flight_.set(granules.begin, granules.end);
  return Entry::both;
}

/// What was dirty stays it: part of a granule may have been written only, or somebody else has marked it meanwhile.
void MirrorEngine::leave(GuestRange range, bool alike) {
  const Granules granules = touched(range);
  in_flight_.clear(granules.begin, granules.end);
  if (!alike) dirty_.set(granules.begin, granules.end);
}

void MirrorEngine::set_rate(uint64_t rate) {
  rate_ = rate;
  allowed_at_ = {};
}

}  // namespace imgfuse::job
