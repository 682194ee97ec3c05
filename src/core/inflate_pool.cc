#include "core/inflate_pool.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "base/math.h"
#include "base/no_wait.h"

namespace imgfuse {
namespace {

/// A request of less is done before another thread has woken up.
constexpr uint64_t kWorthSharing = 128_KiB;
/// Who has read this much in sequence, in more than one request, will go on.
constexpr uint64_t kSequential = 256_KiB;
/// The kernel's read-ahead has more than one request under way, and they arrive in any order.
constexpr uint64_t kOutOfOrder = 1_MiB;

}  // namespace

unsigned InflatePool::default_threads() { return std::clamp(std::thread::hardware_concurrency(), 2u, 4u); }

Result<> InflatePool::run(GuestRange request, size_t count, const Job& job) {
  if (NoWait* const hurried = NoWait::current()) {
    if (count > 1) return hurried->miss();  // to be shared with threads that may wait
    IMG_TRY(job(0));
    const Lock lock(mutex_);
    note(request);
    return {};
  }
  Batch batch(job, count);
  Lock lock(mutex_);
  batches_.push_back(batch);
  if (count > 1 && count * options_.cluster_size >= kWorthSharing) start_threads();
  note(request);
  while (batch.next < count) {
    const size_t index = take_job(batch);
    lock.unlock();
    Result<> result = job(index);
    lock.lock();
    end_job(batch, index, std::move(result));
  }
  while (batch.running > 0) finished_.wait(lock);
  return batch.error ? Result<>(fail(*std::move(batch.error))) : Result<>{};
}

size_t InflatePool::take_job(Batch& batch) {
  const size_t index = batch.next++;
  if (batch.next == batch.count) batches_.erase(batches_.iterator_to(batch));
  ++batch.running;
  return index;
}

void InflatePool::end_job(Batch& batch, size_t index, Result<> result) {
  if (!result && index < batch.failed) {
    batch.failed = index;
    batch.error = std::move(result).error();
  }
  if (--batch.running == 0) finished_.notify_all();
}

/// Finds out whether somebody reads in sequence, and what to inflate then.
void InflatePool::note(GuestRange request) {
  if (options_.window == 0) return;
  const uint64_t begin = request.begin.bytes();
  const auto goes_on = [&](const Reader& reader) {
    return reader.bytes > 0 && begin <= reader.end + kOutOfOrder && begin + kOutOfOrder >= reader.end;
  };
  auto reader = std::find_if(readers_.begin(), readers_.end(), goes_on);
  const bool another = reader == readers_.end();
  if (another) {
    reader = std::min_element(readers_.begin(), readers_.end(),
                              [](const Reader& a, const Reader& b) { return a.last_use < b.last_use; });
    *reader = {};
  }
  reader->last_use = ++requests_;
  reader->end = std::max(reader->end, request.end().bytes());
  reader->bytes += request.length;
  if (another || reader->bytes < kSequential) return;
  reader->next = std::max(reader->next, round_up(reader->end, options_.cluster_size));
  reader->limit = reader->end + std::min(reader->bytes, options_.window);
  if (reader->next < reader->limit) start_threads();
}

std::optional<GuestOffset> InflatePool::take_ahead() {
  for (Reader& reader : readers_)
    if (reader.next < reader.limit) return GuestOffset(std::exchange(reader.next, reader.next + options_.cluster_size));
  return std::nullopt;
}

/// There is work for them.
void InflatePool::start_threads() {
  wanted_.notify_all();
  if (stopped_ || !threads_.empty()) return;
  try {
    while (threads_.size() < options_.threads) threads_.emplace_back([this] { work(); });
  } catch (const std::system_error&) {
    // No more threads for this process: everything works without.
  }
}

/// What a request waits for goes first.
void InflatePool::work() {
  Lock lock(mutex_);
  while (!stopped_) {
    if (!batches_.empty()) {
      Batch& batch = batches_.front();
      const size_t index = take_job(batch);
      lock.unlock();
      Result<> result = batch.job(index);
      lock.lock();
      end_job(batch, index, std::move(result));
    } else if (const auto next = take_ahead()) {
      lock.unlock();
      ahead_(*next);
      lock.lock();
    } else {
      wanted_.wait(lock);
    }
  }
}

void InflatePool::stop() {
  std::vector<std::thread> ended;
  {
    Lock lock(mutex_);
    stopped_ = true;
    wanted_.notify_all();
    ended.swap(threads_);
  }
  for (std::thread& thread : ended) thread.join();
}

}  // namespace imgfuse
