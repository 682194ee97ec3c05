// Tables of an image in memory: found by their place in the file, shared by concurrent requests, written back in
// batches.
#pragma once

#include <boost/intrusive/list.hpp>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "base/mutex.h"
#include "base/per_cpu.h"
#include "imgfuse/error.h"
#include "imgfuse/statistics.h"
#include "imgfuse/storage.h"

namespace imgfuse {

/// Caches tables (or equal slices of larger tables) of one size, each under its host offset.
///
///        pin() misses            last unpin, not dirty          victim, if nobody looked at it lately
///   ── ► loading ── read ── ► in use ◄────────────► idle (in turn) ── ► gone
///                               │ edit()              ▲
///                               ▼                     │ thaw(), unless edited meanwhile
///                             dirty ── freeze() ── ► frozen: its content is being written
///
/// Two threads that miss the same table load it once. Eviction never writes: only idle tables are victims. The bound
/// may be exceeded while everything is pinned or dirty, and the cache shrinks back afterwards.
///
/// Two locks protect a table. The *content* belongs to the owner's metadata lock: read it with that lock shared, edit()
/// and freeze() with it exclusive. Everything else belongs to the cache's own mutex (rank 6), which is never held
/// during I/O. pin() may block and must be called without the metadata lock.
class TableCache {
  struct Table;

 public:
  /// Where a dirty table is written in a flush cycle: 0 before the first barrier, 1 behind it.
  static constexpr unsigned kStages = 2;
  /// What pin() does when there is neither room nor a victim.
  enum class Room { flush_for_it, exceed };

  /// `capacity_bytes` counts what a table costs besides its content, too.
  TableCache(Storage& storage, size_t table_bytes, uint64_t capacity_bytes);
  ~TableCache();
  TableCache(const TableCache&) = delete;
  TableCache& operator=(const TableCache&) = delete;

  /// Called without any lock of the cache when only dirty tables are left: runs a flush cycle.
  void set_make_room(std::function<void()> make_room) { make_room_ = std::move(make_room); }

  /// Keeps one table in memory while it lives.
  class [[nodiscard]] Pin {
   public:
    Pin() = default;
    Pin(Pin&& other) noexcept : cache_(other.cache_), table_(std::exchange(other.table_, nullptr)) {}
    Pin& operator=(Pin&& other) noexcept {
      std::swap(cache_, other.cache_);
      std::swap(table_, other.table_);
      return *this;
    }
    ~Pin() {
      if (table_) cache_->unpin(*table_);
    }
    explicit operator bool() const { return table_ != nullptr; }
    /// With the metadata lock held, at least shared; valid until it is released.
    ConstBytes content() const;

   private:
    friend class TableCache;
    Pin(TableCache& cache, Table& table) : cache_(&cache), table_(&table) {}
    TableCache* cache_ = nullptr;
    Table* table_ = nullptr;
  };

  Result<Pin> pin(HostOffset offset, Room room = Room::flush_for_it) EXCLUDES(mutex_);

  /// What `look(content)` returns, if the table is here; it calls nothing of the cache. With the metadata lock held, at
  /// least shared. Excludes nobody who does the same.
  template <class Look, class Seen = std::invoke_result_t<Look, ConstBytes>>
  std::optional<Seen> look_at(HostOffset offset, Look look) const EXCLUDES(mutex_) {
    SharedLock lock(mutex_);
    const auto found = by_offset_.find(offset.bytes());
    if (found == by_offset_.end() || found->second->loading || found->second->load_error) return std::nullopt;
    Table& table = *found->second;
    if (!table.looked_at.load(std::memory_order_relaxed)) table.looked_at.store(true, std::memory_order_relaxed);
    hits_.add();
    return look(ConstBytes(table.content.get(), table_bytes_));
  }

  /// The whole content, of which `length` bytes from `first` on are about to change: they are dirty for `stage` now. A
  /// table is always dirty for the same stage. With the metadata lock held exclusively, from here to the last change.
  Bytes edit(const Pin& pin, unsigned stage, size_t first, size_t length) EXCLUDES(mutex_);

  /// Forgets tables that begin in the range, dirty or not, without writing them: what lies there is no table any more,
  /// or its content was written by other means. Pins on them stay valid but belong to nobody.
  void drop(HostRange range) EXCLUDES(mutex_);

  /// Dirty tables as they were at a cut, in host order.
  struct Frozen {
    Table* table;
    HostOffset offset;
    std::shared_ptr<const std::byte[]> content;
    uint64_t sectors;  ///< a bit for each sector that has changed
  };
  using Batch = std::vector<Frozen>;
  /// Takes all dirty tables of a stage. With the metadata lock held exclusively.
  Batch freeze(unsigned stage) EXCLUDES(mutex_);
  /// Writes what has changed of the batch, neighbours together. No lock needed.
  Result<> write(const Batch& batch);
  /// Ends a freeze. What was not written is dirty again.
  void thaw(const Batch& batch, bool written) EXCLUDES(mutex_);

  size_t table_bytes() const { return table_bytes_; }
  bool has_dirty(unsigned stage) const EXCLUDES(mutex_);
  /// More than half of the cache is dirty: time for a cycle.
  bool wants_flush() const EXCLUDES(mutex_);

  struct Statistics {
    uint64_t hits = 0, loads = 0, evictions = 0;
    size_t tables = 0, dirty = 0;
  };
  Statistics statistics() const EXCLUDES(mutex_);
  /// The same, as a disk tells of it.
  void add_to(DiskStatistics& disk) const EXCLUDES(mutex_);

 private:
  struct Table : boost::intrusive::list_base_hook<> {
    HostOffset offset;
    std::shared_ptr<std::byte[]> content;  // owner's metadata lock
    unsigned pins = 0;
    unsigned stage = 0;                   // where it is written when dirty
    std::atomic<bool> looked_at = false;  // by look_at(), since it became idle
    bool loading = false;
    bool attached = true;         // found by its offset
    bool dirty = false;           // in dirty_[stage]
    uint64_t changed = 0;         // a bit for each sector that is dirty
    bool frozen = false;          // a batch refers to it
    bool content_frozen = false;  // …and shares its content
    std::optional<Error> load_error;
  };
  using List = boost::intrusive::list<Table>;

  void unpin(Table& table) EXCLUDES(mutex_);
  Result<Pin> load(HostOffset offset) REQUIRES(mutex_);
  bool has_room() const REQUIRES(mutex_) { return count_ < max_tables_; }
  void detach(Table& table) REQUIRES(mutex_);
  void release_if_unused(Table& table) REQUIRES(mutex_);
  void evict_one() REQUIRES(mutex_);
  void destroy(Table& table) REQUIRES(mutex_);

  Storage& storage_;
  const size_t table_bytes_;
  const size_t sector_bytes_;  // the unit of writing: a table has 64 of them at most
  const size_t max_tables_;
  std::function<void()> make_room_;

  mutable SharedMutex mutex_{LockRank::cache};
  ConditionVariable loaded_;
  std::unordered_map<uint64_t, Table*> by_offset_ GUARDED_BY(mutex_);
  List idle_ GUARDED_BY(mutex_);  // clean and unpinned; the next victim first
  List dirty_[kStages] GUARDED_BY(mutex_);
  size_t count_ GUARDED_BY(mutex_) = 0;  // all tables in being, detached ones too
  size_t dirty_count_ GUARDED_BY(mutex_) = 0;
  Statistics statistics_ GUARDED_BY(mutex_);  // without hits_
  mutable Counter hits_;
};

}  // namespace imgfuse
