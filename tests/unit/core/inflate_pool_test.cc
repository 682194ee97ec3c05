#include "core/inflate_pool.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <future>
#include <set>
#include <thread>

#include "support/gate_storage.h"
#include "support/must.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kCluster = 65536;

GuestRange range(uint64_t begin, uint64_t length) { return {GuestOffset(begin), length}; }

/// Notes what is inflated ahead.
class AheadLog {
 public:
  InflatePool::Ahead sink() {
    return [this](GuestOffset guest) {
      Lock lock(mutex_);
      arrived_ = true;
      changed_.notify_all();
      while (closed_) changed_.wait(lock);
      seen_.push_back(guest.bytes());
      changed_.notify_all();
    };
  }
  void wait_for_arrival() {
    Lock lock(mutex_);
    while (!arrived_) changed_.wait(lock);
  }
  std::vector<uint64_t> wait_for(size_t count) {
    Lock lock(mutex_);
    while (seen_.size() < count) changed_.wait(lock);
    return sorted();
  }
  void wait_for_cluster(uint64_t begin) {
    Lock lock(mutex_);
    while (std::find(seen_.begin(), seen_.end(), begin) == seen_.end()) changed_.wait(lock);
  }
  std::vector<uint64_t> seen() {
    Lock lock(mutex_);
    return sorted();
  }
  void close(bool closed) {
    Lock lock(mutex_);
    closed_ = closed;
    changed_.notify_all();
  }

 private:
  std::vector<uint64_t> sorted() {
    std::sort(seen_.begin(), seen_.end());
    return seen_;
  }
  Mutex mutex_;
  ConditionVariable changed_;
  std::vector<uint64_t> seen_;
  bool arrived_ = false;
  bool closed_ = false;
};

std::vector<uint64_t> clusters(uint64_t begin, uint64_t end) {
  std::vector<uint64_t> all;
  for (uint64_t at = begin; at < end; at += kCluster) all.push_back(at);
  return all;
}

void read(InflatePool& pool, GuestRange request) {
  must(pool.run(request, request.length / kCluster, [](size_t) -> Result<> { return {}; }));
}

size_t threads_of_process() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return static_cast<size_t>(std::distance(begin(tasks), end(tasks)));
}

}  // namespace

TEST_CASE("inflate pool: a request's clusters are inflated by several threads at the same time") {
  InflatePool pool({.cluster_size = kCluster, .threads = 2}, {});
  std::atomic<unsigned> inside = 0;
  std::atomic<unsigned> calls = 0;

  must(pool.run(range(0, 3 * kCluster), 3, [&](size_t) -> Result<> {
    ++inside;
    ++calls;
    while (inside < 3) std::this_thread::yield();  // each waits for the two others
    return {};
  }));

  CHECK(calls == 3);
}

TEST_CASE("inflate pool: the error is that of the first cluster that failed, when all are finished") {
  InflatePool pool({.cluster_size = kCluster, .threads = 2}, {});
  std::atomic<unsigned> calls = 0;

  const Result<> result = pool.run(range(0, 8 * kCluster), 8, [&](size_t i) -> Result<> {
    ++calls;
    if (i == 3 || i == 5) return fail(ErrorCode::corrupt, "cluster {}", i);
    return {};
  });

  REQUIRE_FALSE(result);
  CHECK(result.error().text() == "cluster 3");
  CHECK(calls == 8);
}

TEST_CASE("inflate pool: no thread begins before there is something for it to do") {
  const size_t before = threads_of_process();
  AheadLog log;
  InflatePool pool({.cluster_size = kCluster, .window = 1_MiB, .threads = 2}, log.sink());

  for (uint64_t i = 0; i < 100; ++i) read(pool, range(i * 37 % 100 * 8_MiB, kCluster));

  CHECK(threads_of_process() <= before);  // a thread that ended may be counted for a moment
  CHECK(log.seen().empty());
}

TEST_CASE("inflate pool: ahead of a sequential reader there is at most what it has read, and the window") {
  AheadLog log;
  InflatePool pool({.cluster_size = kCluster, .window = 1_MiB, .threads = 2}, log.sink());

  read(pool, range(0, 256_KiB));
  read(pool, range(256_KiB, 256_KiB));
  CHECK(log.wait_for(8) == clusters(512_KiB, 1_MiB));

  read(pool, range(512_KiB, 512_KiB));
  CHECK(log.wait_for(24) == clusters(512_KiB, 2_MiB));

  read(pool, range(1_MiB, 512_KiB));
  CHECK(log.wait_for(32) == clusters(512_KiB, 2_MiB + 512_KiB));
  pool.stop();
  CHECK(log.seen().size() == 32);
}

TEST_CASE("inflate pool: pieces of clusters are a sequence too, and requests that overtake each other") {
  AheadLog log;
  InflatePool pool({.cluster_size = kCluster, .window = 128_KiB, .threads = 1}, log.sink());
  const auto job = [](size_t) -> Result<> { return {}; };

  for (uint64_t at = 0; at < 256_KiB; at += 4096) must(pool.run(range(at ^ 4096, 4096), 1, job));

  CHECK(log.wait_for(2) == clusters(256_KiB, 384_KiB));
}

TEST_CASE("inflate pool: what a reader has overtaken is not inflated any more") {
  AheadLog log;
  InflatePool pool({.cluster_size = kCluster, .window = 1_MiB, .threads = 1}, log.sink());
  log.close(true);
  read(pool, range(0, 256_KiB));
  read(pool, range(256_KiB, 256_KiB));  // the thread is at the first cluster behind it, at most
  read(pool, range(512_KiB, 512_KiB));

  log.close(false);

  log.wait_for_cluster(2_MiB - kCluster);
  pool.stop();
  std::vector<uint64_t> seen = log.seen();
  std::erase(seen, 512_KiB);
  CHECK(seen == clusters(1_MiB, 2_MiB));
}

TEST_CASE("inflate pool: four readers at once each have their own clusters ahead") {
  AheadLog log;
  InflatePool pool({.cluster_size = kCluster, .window = 256_KiB, .threads = 2}, log.sink());

  for (uint64_t step = 0; step < 2; ++step)
    for (uint64_t reader = 0; reader < 4; ++reader) read(pool, range(reader * 64_MiB + step * 256_KiB, 256_KiB));

  const std::vector<uint64_t> seen = log.wait_for(16);
  for (uint64_t reader = 0; reader < 4; ++reader) {
    const auto own = clusters(reader * 64_MiB + 512_KiB, reader * 64_MiB + 768_KiB);
    CHECK(std::includes(seen.begin(), seen.end(), own.begin(), own.end()));
  }
}

TEST_CASE("inflate pool: stopping waits for what is being inflated, and drops the rest") {
  AheadLog log;
  InflatePool pool({.cluster_size = kCluster, .window = 1_MiB, .threads = 1}, log.sink());
  log.close(true);
  read(pool, range(0, 256_KiB));
  read(pool, range(256_KiB, 256_KiB));
  log.wait_for_arrival();

  auto stop = in_background([&] { pool.stop(); });
  CHECK(waits(stop));
  log.close(false);
  stop.get();

  CHECK(log.seen().size() == 1);
  const auto caller = std::this_thread::get_id();
  must(pool.run(range(512_KiB, 512_KiB), 8, [&](size_t) -> Result<> {
    CHECK(std::this_thread::get_id() == caller);
    return {};
  }));
  CHECK(log.seen().size() == 1);
}

}  // namespace imgfuse::test
