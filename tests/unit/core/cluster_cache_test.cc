#include "core/cluster_cache.h"

#include <doctest/doctest.h>

#include <atomic>
#include <future>
#include <thread>
#include <vector>

#include "support/gate_storage.h"
#include "support/must.h"

namespace imgfuse::test {
namespace {

constexpr size_t kSize = 4096;
constexpr uint64_t kCost = kSize + 256;

HostRange stream(uint64_t offset, uint64_t length = 512) { return {HostOffset(offset), length}; }

ClusterCache::Inflate fill(int value, int* calls = nullptr) {
  return [=](Bytes out) -> Result<> {
    if (calls) ++*calls;
    std::fill(out.begin(), out.end(), static_cast<std::byte>(value));
    return {};
  };
}

int value_of(const ClusterCache::Content& content) { return std::to_integer<int>(content[kSize - 1]); }

struct Fixture {
  std::shared_ptr<ClusterCache> cache = std::make_shared<ClusterCache>(4 * kCost);
  ClusterCache::Part part{cache};
  int calls = 0;
  int get(HostRange where, int value) { return value_of(must(part.get(where, kSize, fill(value, &calls)))); }
};

}  // namespace

TEST_CASE("cluster cache: a cluster is inflated once, and leaves when others need the room") {
  Fixture f;
  CHECK(f.get(stream(0), 1) == 1);
  CHECK(f.get(stream(0), 2) == 1);
  CHECK(value_of(f.part.find(stream(0))) == 1);
  CHECK(f.calls == 1);
  for (uint64_t at = 1; at <= 3; ++at) f.get(stream(at * 700), 9);
  f.get(stream(0), 2);  // used again, so others leave first

  f.get(stream(9000), 9);

  CHECK(f.get(stream(0), 2) == 1);
  CHECK_FALSE(f.part.find(stream(700)));
  CHECK(f.cache->statistics().bytes == 4 * kCost);
}

TEST_CASE("cluster cache: what touches a range is dropped, and nothing else") {
  Fixture f;
  f.get(stream(1000, 400), 1);   // ends before
  f.get(stream(1100, 1000), 2);  // reaches into it
  f.get(stream(2500, 100), 3);   // lies in it
  f.get(stream(3000, 100), 4);   // begins behind it
  const ClusterCache::Part other(f.cache);

  other.drop({HostOffset(0), 10000});
  f.part.drop({HostOffset(1400), 1600});

  CHECK(f.part.find(stream(1000, 400)));
  CHECK_FALSE(f.part.find(stream(1100, 1000)));
  CHECK_FALSE(f.part.find(stream(2500, 100)));
  CHECK(f.part.find(stream(3000, 100)));
  CHECK(f.cache->statistics().bytes == 2 * kCost);
}

TEST_CASE("cluster cache: images share the room and not the clusters, and leave nothing behind") {
  Fixture f;
  f.get(stream(0), 1);
  {
    const ClusterCache::Part other(f.cache);
    CHECK_FALSE(other.find(stream(0)));
    CHECK(value_of(must(other.get(stream(0), kSize, fill(2)))) == 2);
    CHECK(f.get(stream(0), 3) == 1);
    CHECK(f.cache->statistics().bytes == 2 * kCost);
  }
  CHECK(f.cache->statistics().bytes == kCost);
}

TEST_CASE("cluster cache: a stream of another length at the same place is another stream") {
  Fixture f;
  f.get(stream(0, 512), 1);

  CHECK_FALSE(f.part.find(stream(0, 1024)));
  CHECK(f.get(stream(0, 1024), 2) == 2);

  CHECK(f.cache->statistics().bytes == kCost);
}

TEST_CASE("cluster cache: a failure is its caller's only") {
  Fixture f;
  const auto broken = [](Bytes) -> Result<> { return fail(ErrorCode::corrupt, "broken"); };

  CHECK_FALSE(f.part.get(stream(0), kSize, broken));

  CHECK(f.get(stream(0), 1) == 1);
}

TEST_CASE("cluster cache: clusters larger than it are not kept, and none without one") {
  CHECK_FALSE(Fixture().part.keeps(5 * kCost));
  CHECK(Fixture().part.keeps(kSize));
  const ClusterCache::Part none(nullptr);
  CHECK_FALSE(none.keeps(512));
  CHECK_FALSE(none.find(stream(0)));
  none.drop(stream(0));
}

TEST_CASE("cluster cache: who needs what another thread inflates waits for it") {
  Fixture f;
  std::promise<void> go;
  std::atomic<int> calls = 0;
  const ClusterCache::Inflate slow = [&, future = go.get_future().share()](Bytes out) -> Result<> {
    ++calls;
    future.wait();
    std::fill(out.begin(), out.end(), std::byte{1});
    return {};
  };
  auto first = in_background([&] { return value_of(must(f.part.get(stream(0), kSize, slow))); });
  while (calls == 0) std::this_thread::yield();
  auto second = in_background([&] { return value_of(must(f.part.get(stream(0), kSize, slow))); });
  auto third = in_background([&] { return value_of(f.part.find(stream(0))); });
  CHECK(waits(second));
  CHECK(waits(third));
  CHECK_FALSE(f.part.find(stream(700)));

  go.set_value();

  CHECK(first.get() == 1);
  CHECK(second.get() == 1);
  CHECK(third.get() == 1);
  CHECK(calls == 1);
}

TEST_CASE("cluster cache: what is dropped while it is inflated is not kept") {
  Fixture f;
  const auto dropping = [&](Bytes out) -> Result<> {
    f.part.drop(stream(0));
    return fill(1)(out);
  };

  CHECK(value_of(must(f.part.get(stream(0), kSize, dropping))) == 1);

  CHECK_FALSE(f.part.find(stream(0)));
  CHECK(f.cache->statistics().bytes == 0);
}

}  // namespace imgfuse::test
