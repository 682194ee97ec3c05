// Decompressed clusters in memory, so that small reads of a compressed image do not inflate a whole cluster each.
#pragma once

#include <boost/intrusive/list.hpp>

#include <functional>
#include <map>
#include <memory>
#include <utility>

#include "base/mutex.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"
#include "imgfuse/units.h"

namespace imgfuse {

/// Keeps the clusters that were read last, up to a number of bytes for all images of a chain together. Any thread may
/// call; two that miss the same cluster inflate it once. Its mutex (rank 6) is not held while a cluster is inflated.
class ClusterCache {
 public:
  /// `capacity` in bytes counts what a cluster costs besides its content, too.
  explicit ClusterCache(uint64_t capacity) : capacity_(capacity) {}
  ClusterCache(const ClusterCache&) = delete;
  ClusterCache& operator=(const ClusterCache&) = delete;

  using Content = std::shared_ptr<const std::byte[]>;
  /// Fills a cluster; may block.
  using Inflate = std::function<Result<>(Bytes)>;

  /// One image's part of the cache. A cluster is known by where its stream lies on the host, so the owner drops those
  /// of host space that is given up, before it can get new content: as long as an entry points at a stream, its bytes
  /// stay as they are, and whoever reads it holds a lease that keeps the entry.
  class Part {
   public:
    /// `cache` may be null: nothing is kept then.
    explicit Part(std::shared_ptr<ClusterCache> cache);
    ~Part() { drop_all(); }
    Part(const Part&) = delete;
    Part& operator=(const Part&) = delete;

    /// Whether clusters of this size are kept at all.
    bool keeps(uint64_t size) const { return cache_ && size + kCostOfEntry <= cache_->capacity_; }
    /// The cluster if it is there or on its way, for which it blocks, else null.
    Content find(HostRange stream) const;
    /// The cluster, of `size` bytes, inflated if need be. Blocks.
    Result<Content> get(HostRange stream, size_t size, const Inflate& inflate) const;
    /// Forgets all streams that touch the range.
    void drop(HostRange range) const;
    void drop_all() const;

    const std::shared_ptr<ClusterCache>& cache() const { return cache_; }

   private:
    const std::shared_ptr<ClusterCache> cache_;
    const uint64_t number_;
  };

  struct Statistics {
    uint64_t hits = 0, inflated = 0, bytes = 0;
  };
  Statistics statistics() const EXCLUDES(mutex_);
  uint64_t capacity() const { return capacity_; }

 private:
  static constexpr uint64_t kCostOfEntry = 256;  // roughly, in bytes of memory
  using Key = std::pair<uint64_t, uint64_t>;     // part, host offset
  struct Entry : boost::intrusive::list_base_hook<boost::intrusive::link_mode<boost::intrusive::auto_unlink>> {
    Key key;
    uint64_t length = 0;  // of the stream
    uint64_t size = 0;    // of the cluster
    Content content;      // null while it is inflated

    uint64_t cost() const { return size + kCostOfEntry; }
  };
  using Entries = std::map<Key, std::shared_ptr<Entry>>;
  using Recency = boost::intrusive::list<Entry, boost::intrusive::constant_time_size<false>>;

  Content find(Key key, uint64_t length) EXCLUDES(mutex_);
  Content wait_for(Key key, uint64_t length, Lock& lock) REQUIRES(mutex_);
  Result<Content> get(Key key, uint64_t length, size_t size, const Inflate& inflate) EXCLUDES(mutex_);
  void drop(Key first, Key end, uint64_t begin) EXCLUDES(mutex_);
  Entry* touch(Key key, uint64_t length) REQUIRES(mutex_);
  void keep(const std::shared_ptr<Entry>& entry, Content content) REQUIRES(mutex_);
  Entries::iterator erase(Entries::iterator at) REQUIRES(mutex_);

  const uint64_t capacity_;

  mutable Mutex mutex_{LockRank::cache};
  ConditionVariable inflated_;
  Entries entries_ GUARDED_BY(mutex_);
  Recency recent_ GUARDED_BY(mutex_);  // those with content, least recently used first
  uint64_t bytes_ GUARDED_BY(mutex_) = 0;
  uint64_t longest_stream_ GUARDED_BY(mutex_) = 0;
  Statistics statistics_ GUARDED_BY(mutex_);
};

}  // namespace imgfuse
