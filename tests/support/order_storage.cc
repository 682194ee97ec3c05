#include "support/order_storage.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <utility>

#include "base/buffer.h"
#include "base/math.h"

namespace imgfuse::test {
namespace {

bool reads_zero(const MemImage& image, uint64_t offset, uint64_t length) {
  for (uint64_t done = 0; done < length;) {
    const StorageExtent extent = image.extent(offset + done, length - done);
    if (extent.data) {
      std::vector<std::byte> bytes(extent.length);
      image.read(offset + done, bytes);
      if (!is_zero(bytes)) return false;
    }
    done += extent.length;
  }
  return true;
}

bool can_be_watched(const std::shared_ptr<const ImageView>& view) { return view && view->can_be_watched(); }

bool before_cluster(const Reference& reference, uint64_t cluster) { return reference.cluster < cluster; }

}  // namespace

OrderStorage::OrderStorage(std::shared_ptr<Storage> inner, const MemImage& image, OnViolation on_violation)
    : inner_(std::move(inner)), on_violation_(std::move(on_violation)), durable_(image), current_(image) {
  Lock lock(mutex_);
  start_epoch();
}

void OrderStorage::violation(const std::string& text) const {
  if (on_violation_) return on_violation_(text);
  std::fprintf(stderr, "write order: %s\n", text.c_str());
  std::abort();
}

void OrderStorage::apply(const Change& change, MemImage& image) {
  if (change.is_write) {
    image.write(change.offset, change.data);
  } else {
    image.zero(change.offset, change.length);
  }
  if (change.new_size) image.resize(*change.new_size);
}

// ---- The calls

template <class Call>
Result<> OrderStorage::make(Change change, bool discards, Call call) {
  Changes::iterator pending;
  const uint64_t offset = change.offset;
  const uint64_t length = change.length;
  {
    Lock lock(mutex_);
    change.number = ++last_number_;
    pending_.push_back(std::move(change));
    pending = std::prev(pending_.end());
    if (switching_) violation("I9: a change before the switch of tables is durable");
    if (view_) check_targets(*pending, discards);
    apply(*pending, current_);
    if (view_) {
      note_fills(*pending);
      if (touches_metadata(*pending)) check_metadata(*pending);
    }
  }
  Result<> result = call();
  std::vector<std::byte> left;  // by a call that failed: whatever the storage reads as now counts as written
  if (!result) {
    left.resize(length);
    (void)inner_->read(HostOffset(offset), left);
  }
  const uint64_t size = inner_->size().value_or(0);
  Lock lock(mutex_);
  pending->returned = true;
  if (!result) give_up(pending, std::move(left), size);
  return result;
}

Result<> OrderStorage::write(HostOffset offset, std::span<const ConstBytes> parts) {
  Change change{0, offset.bytes(), 0, true, {}};
  for (const ConstBytes part : parts) change.data.insert(change.data.end(), part.begin(), part.end());
  change.length = change.data.size();
  return make(std::move(change), false, [&] { return inner_->write(offset, parts); });
}

Result<> OrderStorage::write_zeroes(HostRange range) {
  return make({0, range.begin.bytes(), range.length, false, {}}, false, [&] { return inner_->write_zeroes(range); });
}

Result<> OrderStorage::discard(HostRange range) {
  return make({0, range.begin.bytes(), range.length, false, {}}, true, [&] { return inner_->discard(range); });
}

/// Cutting the file off discards what lay there.
Result<> OrderStorage::resize(uint64_t size) {
  IMG_LET(const uint64_t old_size, inner_->size());
  Change change{0, size, old_size > size ? old_size - size : 0, false, {}};
  change.new_size = size;
  return make(std::move(change), true, [&] { return inner_->resize(size); });
}

Result<> OrderStorage::flush() {
  std::set<uint64_t> covered;  // other flushes may run at the same time
  {
    Lock lock(mutex_);
    for (const Change& change : pending_)
      if (change.returned) covered.insert(change.number);
  }
  IMG_TRY(inner_->flush());
  Lock lock(mutex_);
  for (auto change = pending_.begin(); change != pending_.end();) {
    if (covered.contains(change->number)) {
      apply(*change, durable_);
      change = pending_.erase(change);
    } else {
      ++change;
    }
  }
  for (auto& [cluster, fill] : fills_)
    if (covered.contains(fill.change)) fill.change = 0;
  std::erase_if(switched_, [&](const auto& switched) { return covered.contains(switched.second.change); });
  start_epoch();
  return {};
}

/// The call failed: some of it may have been written.
void OrderStorage::give_up(Changes::iterator change, std::vector<std::byte> left, uint64_t size) {
  change->is_write = true;
  if (change->new_size) change->new_size = size;
  change->data = std::move(left);
  apply(*change, current_);
  std::erase_if(fills_, [&](const auto& fill) { return fill.second.change == change->number; });
  for (auto* overwritten : {&overwritten_before_, &overwritten_})
    std::erase_if(*overwritten, [&](const auto& part) { return part.second == change->number; });
  start_epoch();
}

// ---- What is possible

/// Only two views are left after a flush: what is durable, and what was written meanwhile.
void OrderStorage::start_epoch() {
  switching_ = false;
  const std::shared_ptr<const ImageView> durable = ImageView::parse(durable_);
  view_ = ImageView::parse(current_);
  if (!can_be_watched(durable) || !can_be_watched(view_)) view_.reset();
  postponed_ = view_ && durable->is_lazy() && view_->is_lazy();
  shows_zeros_ = view_ && durable->may_show_zeros() && view_->may_show_zeros();
  tables_may_change_ = durable && durable->tables_may_change();
  possible_.clear();
  least_.clear();
  if (!view_) {
    fills_.clear();
    overwritten_.clear();
    overwritten_before_.clear();
    return;
  }
  std::set_union(durable->references().begin(), durable->references().end(), view_->references().begin(),
                 view_->references().end(), std::back_inserter(possible_));
  for (const Reference& reference : possible_)
    if (const uint64_t cluster = reference.cluster; least_.empty() || least_.rbegin()->first != cluster)
      least_.emplace_hint(least_.end(), cluster, std::min(durable->count(cluster), view_->count(cluster)));
  std::erase_if(fills_, [&](const auto& each) REQUIRES(mutex_) {
    const auto& [part, fill] = each;
    return (fill.shown && !shows(part)) || (fill.kept && !has_owner(part));
  });
  keep_overwritten();
}

/// The guest zeroes a cluster that it keeps, and writes to it again. The new bytes may be there before a flush makes
/// the zeroed entry durable; so what was written since the flush before is taken for new.
void OrderStorage::keep_overwritten() {
  for (const auto* overwritten : {&overwritten_before_, &overwritten_})
    for (const auto& [part, change] : *overwritten) {
      if (shows(part) || !has_owner(part)) continue;
      const auto same = [number = change](const Change& each) { return each.number == number; };
      const bool pending = std::any_of(pending_.begin(), pending_.end(), same);
      fills_.try_emplace(part, Fill{.change = pending ? change : 0, .kept = true});
    }
  overwritten_before_ = std::exchange(overwritten_, {});
}

template <class F>
void OrderStorage::for_each_possible(uint64_t cluster, F f) const {
  for (auto at = std::lower_bound(possible_.begin(), possible_.end(), cluster, before_cluster);
       at != possible_.end() && at->cluster == cluster; ++at)
    f(*at);
}

bool OrderStorage::shows(uint64_t part) const {
  const uint64_t parts = view_->parts();
  bool shown = false;
  for_each_possible(part / parts, [&](const Reference& reference) { shown |= reference.shown >> part % parts & 1; });
  return shown;
}

bool OrderStorage::has_owner(uint64_t part) const {
  bool has = false;
  for_each_possible(part / view_->parts(), [&](const Reference&) { has = true; });
  return has;
}

// ---- Changes of single clusters (I4)

void OrderStorage::check_targets(const Change& change, bool discards) {
  if (change.length == 0) return;
  const uint64_t size = view_->cluster_size();
  const bool punches_in_place = view_->punches_in_place();
  const std::vector<Reference>& current = view_->references();
  const auto still_there = [&](const Reference& reference) {  // whatever it shows of the cluster
    const auto at = std::lower_bound(current.begin(), current.end(), Reference{reference.cluster, reference.owner, 0});
    return at != current.end() && at->cluster == reference.cluster && at->owner == reference.owner;
  };
  for (uint64_t cluster = change.offset / size; cluster <= (change.offset + change.length - 1) / size; ++cluster)
    for_each_possible(cluster, [&](const Reference& reference) {
      const auto say = [&](const char* what) {
        violation(fmt::format("I4: {} cluster {} ({:#x}+{:#x}), which {}: {}", discards ? "discard of" : "write to",
                              cluster, change.offset, change.length, what, reference.owner.text()));
      };
      if (discards && (change.new_size || !punches_in_place)) return say("is in use");
      if (reference.is_stream()) {
        const bool beside =
            change.offset > reference.stream_last || change.offset + change.length <= reference.stream_begin;
        return beside ? void() : say("holds a compressed stream there");
      }
      if (reference.owner.snapshot != 0) return say("belongs to a snapshot");
      if (!still_there(reference)) say("was unmapped, but not durably");
    });
}

/// Remembers the first change that leaves nothing of a part's former content, from when nobody could see it; and the
/// first since the flush, where somebody can.
void OrderStorage::note_fills(const Change& change) {
  if (change.length == 0) return;
  const uint64_t size = view_->part_size();
  const uint64_t end = change.offset + change.length;
  for (uint64_t part = change.offset / size; part <= (end - 1) / size; ++part) {
    const bool shown = shows(part);
    if (shown ? overwritten_.contains(part) : fills_.contains(part)) continue;
    const uint64_t from = std::max(change.offset, part * size);
    const uint64_t to = std::min(end, (part + 1) * size);
    if (!reads_zero(current_, part * size, from - part * size) || !reads_zero(current_, to, (part + 1) * size - to))
      continue;
    if (shown) {
      overwritten_.emplace(part, change.number);
    } else {
      fills_[part].change = change.number;
    }
  }
}

// ---- Changes of metadata

bool OrderStorage::touches_metadata(const Change& change) const {
  if (change.length == 0) return false;
  const uint64_t size = view_->cluster_size();
  const std::vector<Reference>& current = view_->references();
  for (auto at = std::lower_bound(current.begin(), current.end(), change.offset / size, before_cluster);
       at != current.end() && at->cluster * size < change.offset + change.length; ++at)
    if (at->owner.is_metadata()) return true;
  return false;
}

void OrderStorage::check_metadata(const Change& change) {
  std::shared_ptr<const ImageView> next = ImageView::parse(current_);
  if (!can_be_watched(next)) {
    view_.reset();  // asleep until the next flush
    return;
  }
  for (const std::string& problem : next->problems()) violation("malformed: " + problem);
  if (!tables_may_change_ && next->references() != view_->references())
    violation("tables change, but the durable header says that they need no check");
  view_ = std::move(next);
  postponed_ = postponed_ && view_->is_lazy();
  shows_zeros_ = shows_zeros_ && view_->may_show_zeros();
  if (switches_tables(change)) return check_switch();
  check_refcount_table(change);

  std::vector<Reference> fresh;
  std::set_difference(view_->references().begin(), view_->references().end(), possible_.begin(), possible_.end(),
                      std::back_inserter(fresh));
  for (const Reference& reference : fresh) check_shown(reference);

  const size_t old_size = possible_.size();
  possible_.insert(possible_.end(), fresh.begin(), fresh.end());
  std::inplace_merge(possible_.begin(), possible_.begin() + static_cast<ptrdiff_t>(old_size), possible_.end());
  for (const Reference& reference : fresh)
    if (!least_.contains(reference.cluster)) {
      const std::shared_ptr<const ImageView> durable = ImageView::parse(durable_);
      for (const Reference& each : fresh) least_.try_emplace(each.cluster, durable->count(each.cluster));
      break;
    }
  check_counts();
}

/// The refcount table's place in the header changes together with another table's.
bool OrderStorage::switches_tables(const Change& change) const {
  if (change.offset >= 72) return false;
  std::byte before[72], after[72];
  durable_.read(0, before);
  current_.read(0, after);
  const auto differ = [&](size_t begin, size_t end) {
    return !std::equal(before + begin, before + end, after + begin);
  };
  return differ(48, 60) && (differ(36, 48) || differ(60, 72));
}

/// I9. A crash leaves the state before or the state after, so that each has to be right without the other.
void OrderStorage::check_switch() {
  if (pending_.size() != 1) violation("I9: tables are switched before all else is durable");
  if (const std::string wrong = view_->find_corruption(); !wrong.empty()) violation("I9: " + wrong);
  std::vector<Reference> fresh;
  std::set_difference(view_->references().begin(), view_->references().end(), possible_.begin(), possible_.end(),
                      std::back_inserter(fresh));
  for (const Reference& reference : fresh) check_shown(reference);
  switching_ = true;
}

/// I1 and I5 in one: no mixture of what may be there has more references than counts.
void OrderStorage::check_counts() {
  auto counted = least_.begin();
  for (auto first = possible_.begin(); first != possible_.end();) {
    while (counted->first < first->cluster) ++counted;
    uint64_t owners = 0;
    auto next = first;
    for (; next != possible_.end() && next->cluster == first->cluster; ++next)
      owners += next == first || next->owner != std::prev(next)->owner;
    uint64_t& least = counted->second;
    const uint64_t stored = view_->count(first->cluster);
    const bool lowered = stored < least;
    least = std::min(least, stored);
    uint64_t allowed = least;
    if (const auto switched = switched_.find(first->cluster); switched != switched_.end())
      allowed = std::max(allowed, std::min(stored, switched->second.count));
    // A refcount block that counts itself is counted as long as something points at it.
    const bool went_with_itself = owners == 1 && first->owner.kind == Owner::Kind::refcount_block &&
                                  first->owner.index == first->cluster / view_->counts_per_block() &&
                                  !std::binary_search(view_->references().begin(), view_->references().end(), *first);
    if (owners > allowed && !postponed_ && !went_with_itself)
      violation(fmt::format("{}: cluster {} may have {} references ({}{}) with a durable count of {}",
                            lowered ? "I5" : "I1", first->cluster, owners, first->owner.text(),
                            owners > 1 ? ", " + std::prev(next)->owner.text() : "", allowed));
    first = next;
  }
}

void OrderStorage::check_shown(const Reference& reference) {
  if (reference.is_stream()) return check_stream_shown(reference);
  for (uint64_t part = 0; part < view_->parts(); ++part)
    if (reference.shown >> part & 1) check_shown(reference, part);
}

/// I2, I3, I6: what a new pointer shows was written since it was last seen, and flushed.
void OrderStorage::check_shown(const Reference& reference, uint64_t part) {
  bool seen = false;
  bool kept = false;  // by the same owner, as zeros
  for_each_possible(reference.cluster, [&](const Reference& other) {
    seen |= other.shown >> part & 1;
    kept |= other.owner == reference.owner;
  });
  const uint64_t in_file = reference.cluster * view_->parts() + part;
  const auto fill = fills_.find(in_file);
  if (fill != fills_.end()) {
    if (fill->second.change && !seen && !may_show_early(reference, part) && !is_empty_table(reference, in_file))
      violation(fmt::format("{}: {} points at cluster {}, whose content is not flushed",
                            reference.owner.is_metadata() ? "I3" : "I2", reference.owner.text(), reference.cluster));
    fill->second.shown = true;
    return;
  }
  const uint64_t size = view_->part_size();
  const bool zeros = reads_zero(durable_, in_file * size, size) && reads_zero(current_, in_file * size, size);
  if (!seen && !kept && !zeros)
    violation(fmt::format("I4: {} points at cluster {}, which still holds what it held before it was freed",
                          reference.owner.text(), reference.cluster));
}

/// Without the bytes there are zeros, and the guest has read zeros: where the entry showed a cluster of its own before,
/// it would have been written in place, had the guest not discarded it.
bool OrderStorage::may_show_early(const Reference& reference, uint64_t part) const {
  const uint64_t size = view_->part_size();
  const uint64_t begin = (reference.cluster * view_->parts() + part) * size;
  const bool was_zeros = std::none_of(possible_.begin(), possible_.end(), [&](const Reference& other) REQUIRES(mutex_) {
    if (other.owner != reference.owner) return false;
    return other.is_stream() || (other.shown != 0 && least_.at(other.cluster) != 1);
  });
  return shows_zeros_ && was_zeros && begin + size <= durable_.size() && reads_zero(durable_, begin, size);
}

/// Whatever a crash leaves of a table that is full of zeros durably is a table too.
bool OrderStorage::is_empty_table(const Reference& reference, uint64_t part) const {
  const uint64_t begin = part * view_->part_size();
  return reference.owner.kind == Owner::Kind::l2_table && begin + view_->part_size() <= durable_.size() &&
         reads_zero(durable_, begin, view_->part_size());
}

/// I2 for a stream: no write of its bytes waits for a flush. The cluster may hold older bytes beside them.
void OrderStorage::check_stream_shown(const Reference& reference) {
  for (const Change& change : pending_)
    for (const uint64_t byte : {reference.stream_begin, reference.stream_last})
      if (change.offset <= byte && byte < change.offset + change.length)
        violation(fmt::format("I2: {} points at a stream at {:#x}, which is not flushed", reference.owner.text(),
                              reference.stream_begin));
  if (const auto fill = fills_.find(reference.cluster); fill != fills_.end()) fill->second.shown = true;
}

/// I6. A new refcount block describes itself, so its count becomes durable with the very sector that points at it.
void OrderStorage::check_refcount_table(const Change& change) {
  const bool in_header = change.offset < 512;
  const uint64_t table = view_->refcount_table();
  const bool in_table = change.offset < table + view_->refcount_table_bytes() && table < change.offset + change.length;
  if (!in_header && !in_table) return;
  for (uint64_t sector = round_down(change.offset, 512); sector < change.offset + change.length; sector += 512) {
    MemImage mixed = durable_;
    std::byte bytes[512];
    current_.read(sector, bytes);
    mixed.write(sector, bytes);
    const std::shared_ptr<const ImageView> view = ImageView::parse(mixed);
    if (!view) continue;
    for (const Reference& reference : view->references()) {
      const Owner::Kind kind = reference.owner.kind;
      if (kind != Owner::Kind::refcount_block && kind != Owner::Kind::refcount_table) continue;
      const uint64_t count = view->count(reference.cluster);
      if (count == 0)
        violation(fmt::format("I6: {} at cluster {} may be reached without a count of its own", reference.owner.text(),
                              reference.cluster));
      switched_[reference.cluster] = {change.number, count};
    }
  }
}

}  // namespace imgfuse::test
