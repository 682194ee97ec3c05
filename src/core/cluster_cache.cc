#include "core/cluster_cache.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "base/no_wait.h"

namespace imgfuse {
namespace {

constexpr uint64_t kEnd = std::numeric_limits<uint64_t>::max();

uint64_t next_number() {
  static std::atomic<uint64_t> last = 0;
  return ++last;
}

}  // namespace

ClusterCache::Part::Part(std::shared_ptr<ClusterCache> cache) : cache_(std::move(cache)), number_(next_number()) {}

ClusterCache::Content ClusterCache::Part::find(HostRange stream) const {
  return cache_ ? cache_->find({number_, stream.begin.bytes()}, stream.length) : nullptr;
}

Result<ClusterCache::Content> ClusterCache::Part::get(HostRange stream, size_t size, const Inflate& inflate) const {
  return cache_->get({number_, stream.begin.bytes()}, stream.length, size, inflate);
}

void ClusterCache::Part::drop(HostRange range) const {
  if (cache_) cache_->drop({number_, 0}, {number_, range.end().bytes()}, range.begin.bytes());
}

void ClusterCache::Part::drop_all() const {
  if (cache_) cache_->drop({number_, 0}, {number_, kEnd}, 0);
}

/// The entry for a stream, used just now; null if there is none.
ClusterCache::Entry* ClusterCache::touch(Key key, uint64_t length) {
  const auto at = entries_.find(key);
  if (at == entries_.end() || at->second->length != length) return nullptr;
  Entry& entry = *at->second;
  if (entry.content) {
    recent_.erase(recent_.iterator_to(entry));
    recent_.push_back(entry);
  }
  return &entry;
}

ClusterCache::Content ClusterCache::find(Key key, uint64_t length) {
  Lock lock(mutex_);
  return wait_for(key, length, lock);
}

/// Null if nobody has it, who inflated it failed, or the caller does not want to wait.
ClusterCache::Content ClusterCache::wait_for(Key key, uint64_t length, Lock& lock) {
  for (Entry* entry = touch(key, length); entry; entry = touch(key, length)) {
    if (entry->content) {
      ++statistics_.hits;
      return entry->content;
    }
    if (NoWait::current()) return nullptr;
    inflated_.wait(lock);
  }
  return nullptr;
}

Result<ClusterCache::Content> ClusterCache::get(Key key, uint64_t length, size_t size, const Inflate& inflate) {
  Lock lock(mutex_);
  if (Content content = wait_for(key, length, lock)) return content;
  if (NoWait::current() && touch(key, length)) return NoWait::current()->miss();  // another thread is at it
  const auto entry = std::make_shared<Entry>();
  entry->key = key;
  entry->length = length;
  entry->size = size;
  if (const auto other = entries_.find(key); other != entries_.end()) erase(other);  // of another length
  entries_[key] = entry;
  longest_stream_ = std::max(longest_stream_, length);

  lock.unlock();
  auto content = std::make_shared_for_overwrite<std::byte[]>(size);
  Result<> done = inflate({content.get(), size});
  lock.lock();
  inflated_.notify_all();
  const auto at = entries_.find(key);
  const bool dropped = at == entries_.end() || at->second != entry;
  if (!would_wait(done)) ++statistics_.inflated;
  if (!done) {
    if (!dropped) erase(at);
    return fail(std::move(done).error());
  }
  if (!dropped) keep(entry, content);
  return Content(std::move(content));
}

void ClusterCache::keep(const std::shared_ptr<Entry>& entry, Content content) {
  bytes_ += entry->cost();
  entry->content = std::move(content);
  recent_.push_back(*entry);
  while (bytes_ > capacity_) erase(entries_.find(recent_.front().key));
}

ClusterCache::Entries::iterator ClusterCache::erase(Entries::iterator at) {
  if (at->second->content) bytes_ -= at->second->cost();
  return entries_.erase(at);  // leaves the list of its own accord
}

/// Those up to `end` whose streams reach past `begin`.
void ClusterCache::drop(Key first, Key end, uint64_t begin) {
  Lock lock(mutex_);
  if (entries_.empty()) return;
  first.second = begin > longest_stream_ ? begin - longest_stream_ : 0;
  for (auto at = entries_.lower_bound(first); at != entries_.end() && at->first < end;)
    at = at->first.second + at->second->length > begin ? erase(at) : std::next(at);
}

ClusterCache::Statistics ClusterCache::statistics() const {
  Lock lock(mutex_);
  Statistics statistics = statistics_;
  statistics.bytes = bytes_;
  return statistics;
}

}  // namespace imgfuse
