#include "core/table_cache.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "base/no_wait.h"

namespace imgfuse {
namespace {

constexpr size_t kMinTables = 16;  // enough for every request to pin what it needs at once
constexpr size_t kOverhead = 256;  // the entry, its place in the hash table, and what the allocator adds

}  // namespace

TableCache::TableCache(Storage& storage, size_t table_bytes, uint64_t capacity_bytes)
    : storage_(storage),
      table_bytes_(table_bytes),
      sector_bytes_(std::max<size_t>(512, table_bytes / 64)),
      max_tables_(std::max(kMinTables, capacity_bytes / (table_bytes + kOverhead))) {}

TableCache::~TableCache() NO_THREAD_SAFETY_ANALYSIS {
  idle_.clear();
  for (List& list : dirty_) list.clear();
  for (auto& [offset, table] : by_offset_) delete table;
}

ConstBytes TableCache::Pin::content() const { return {table_->content.get(), cache_->table_bytes_}; }

Result<TableCache::Pin> TableCache::pin(HostOffset offset, Room room) {
  ExclusiveLock lock(mutex_);
  for (bool may_flush = room == Room::flush_for_it && make_room_;; may_flush = false) {
    if (auto found = by_offset_.find(offset.bytes()); found != by_offset_.end()) {
      Table& table = *found->second;
      if (table.loading && NoWait::current()) return NoWait::current()->miss();
      if (table.pins++ == 0 && !table.dirty && !table.frozen) idle_.erase(idle_.iterator_to(table));
      while (table.loading) loaded_.wait(lock);
      if (table.load_error) {
        Error error = *table.load_error;
        --table.pins;
        release_if_unused(table);
        // Who loaded it did not want to wait.
        if (error.code() == ErrorCode::would_wait && !NoWait::current()) continue;
        return fail(std::move(error));
      }
      hits_.add();
      return Pin(*this, table);
    }
    if (!has_room() && !idle_.empty()) evict_one();
    if (has_room() || !may_flush || dirty_count_ == 0) return load(offset);
    if (NoWait::current()) return NoWait::current()->miss();
    lock.unlock();
    make_room_();
    lock.lock();
  }
}

Result<TableCache::Pin> TableCache::load(HostOffset offset) {
  auto* table = new Table;
  table->offset = offset;
  table->pins = 1;
  table->loading = true;
  by_offset_.emplace(offset.bytes(), table);
  ++count_;

  mutex_.unlock();
  auto content = std::make_shared_for_overwrite<std::byte[]>(table_bytes_);
  Result<> read = storage_.read(offset, {content.get(), table_bytes_});
  mutex_.lock();

  table->content = std::move(content);
  table->loading = false;
  loaded_.notify_all();
  if (!would_wait(read)) ++statistics_.loads;
  if (read) return Pin(*this, *table);
  table->load_error = read.error();
  if (table->attached) detach(*table);
  --table->pins;
  release_if_unused(*table);
  return fail(std::move(read).error());
}

void TableCache::unpin(Table& table) {
  ExclusiveLock lock(mutex_);
  --table.pins;
  release_if_unused(table);
}

/// Decides what becomes of a table that may have lost its last user.
void TableCache::release_if_unused(Table& table) {
  if (table.pins > 0 || table.dirty || table.frozen) return;
  if (!table.attached) return destroy(table);
  idle_.push_back(table);
  while (count_ > max_tables_ && !idle_.empty()) evict_one();
}

/// A table that was looked at since it became idle has another turn.
void TableCache::evict_one() {
  while (idle_.front().looked_at.exchange(false, std::memory_order_relaxed))
    idle_.splice(idle_.end(), idle_, idle_.begin());
  Table& victim = idle_.front();
  idle_.pop_front();
  ++statistics_.evictions;
  detach(victim);
  destroy(victim);
}

void TableCache::detach(Table& table) {
  by_offset_.erase(table.offset.bytes());
  table.attached = false;
}

void TableCache::destroy(Table& table) {
  --count_;
  delete &table;
}

Bytes TableCache::edit(const Pin& pin, unsigned stage, size_t first, size_t length) {
  Table& table = *pin.table_;
  ExclusiveLock lock(mutex_);
  if (table.content_frozen) {
    auto copy = std::make_shared_for_overwrite<std::byte[]>(table_bytes_);
    std::memcpy(copy.get(), table.content.get(), table_bytes_);
    table.content = std::move(copy);
    table.content_frozen = false;
  }
  if (!table.dirty && table.attached) {
    table.dirty = true;
    table.stage = stage;
    dirty_[stage].push_back(table);
    ++dirty_count_;
  }
  assert(!table.dirty || table.stage == stage);
  const uint64_t begin = first / sector_bytes_;
  const uint64_t count = (first + length - 1) / sector_bytes_ - begin + 1;
  table.changed |= ~uint64_t{0} >> (64 - count) << begin;
  return {table.content.get(), table_bytes_};
}

void TableCache::drop(HostRange range) {
  ExclusiveLock lock(mutex_);
  for (HostOffset offset = range.begin; offset < range.end(); offset = offset + table_bytes_) {
    auto found = by_offset_.find(offset.bytes());
    if (found == by_offset_.end()) continue;
    Table& table = *found->second;
    detach(table);
    if (table.dirty) {
      dirty_[table.stage].erase(List::s_iterator_to(table));
      table.dirty = false;
      --dirty_count_;
      release_if_unused(table);
    } else if (table.pins == 0 && !table.frozen) {
      idle_.erase(List::s_iterator_to(table));
      destroy(table);
    }
  }
}

TableCache::Batch TableCache::freeze(unsigned stage) {
  Batch batch;
  {
    ExclusiveLock lock(mutex_);
    batch.reserve(dirty_[stage].size());
    while (!dirty_[stage].empty()) {
      Table& table = dirty_[stage].front();
      dirty_[stage].pop_front();
      --dirty_count_;
      table.dirty = false;
      table.frozen = table.content_frozen = true;
      batch.push_back({&table, table.offset, table.content, std::exchange(table.changed, 0)});
    }
  }
  std::sort(batch.begin(), batch.end(), [](const Frozen& a, const Frozen& b) { return a.offset < b.offset; });
  return batch;
}

Result<> TableCache::write(const Batch& batch) {
  std::vector<ConstBytes> run;
  HostOffset begin, end;
  for (const Frozen& table : batch) {
    for (size_t at = 0; at < table_bytes_; at += sector_bytes_) {
      if (!(table.sectors >> (at / sector_bytes_) & 1)) continue;
      if (!run.empty() && table.offset + at != end) {
        IMG_TRY(storage_.write(begin, run));
        run.clear();
      }
      if (run.empty()) begin = end = table.offset + at;
      const ConstBytes sector(table.content.get() + at, sector_bytes_);
      if (!run.empty() && run.back().data() + run.back().size() == sector.data()) {
        run.back() = {run.back().data(), run.back().size() + sector.size()};
      } else {
        run.push_back(sector);
      }
      end = end + sector_bytes_;
    }
  }
  return run.empty() ? Result<>{} : storage_.write(begin, run);
}

void TableCache::thaw(const Batch& batch, bool written) {
  ExclusiveLock lock(mutex_);
  for (const Frozen& frozen : batch) {
    Table& table = *frozen.table;
    table.frozen = table.content_frozen = false;
    if (!written && table.attached) {
      table.changed |= frozen.sectors;
      if (!table.dirty) {
        table.dirty = true;
        dirty_[table.stage].push_back(table);
        ++dirty_count_;
      }
    }
    release_if_unused(table);
  }
}

bool TableCache::has_dirty(unsigned stage) const {
  SharedLock lock(mutex_);
  return !dirty_[stage].empty();
}

bool TableCache::wants_flush() const {
  SharedLock lock(mutex_);
  return dirty_count_ > max_tables_ / 2;
}

TableCache::Statistics TableCache::statistics() const {
  SharedLock lock(mutex_);
  Statistics now = statistics_;
  now.hits = hits_.get();
  now.tables = count_;
  now.dirty = dirty_count_;
  return now;
}

void TableCache::add_to(DiskStatistics& disk) const {
  const Statistics now = statistics();
  disk.table_hits += now.hits;
  disk.table_loads += now.loads;
  disk.table_evictions += now.evictions;
  disk.tables += now.tables;
  disk.dirty_tables += now.dirty;
}

}  // namespace imgfuse
