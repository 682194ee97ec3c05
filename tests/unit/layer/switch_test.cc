#include "layer/switch.h"

#include <doctest/doctest.h>

#include <atomic>
#include <future>

#include "../fuse/memory_snapshots.h"
#include "imgfuse/background_copy.h"
#include "layer/forwarding.h"
#include "support/gate_storage.h"
#include "support/must.h"
#include "support/noted_fetches.h"
#include "support/random.h"

namespace imgfuse::layer {
namespace {

using fuse::MemoryDisk;
using fuse::SnapshotMemoryDisk;
using test::in_background;
using test::must;
using test::pattern;
using test::waits;

constexpr uint64_t kSize = 1_MiB;

TEST_CASE("switch: requests go to the disk that is behind it") {
  MemoryDisk first(kSize), second(2 * kSize);
  Switch through(first);
  must(through.write(GuestOffset(0), pattern(512, 1)));

  {
    Standstill standstill(through);
    standstill.set_disk(second);
  }
  must(through.write(GuestOffset(512), pattern(512, 2)));
  must(through.write_zeroes({GuestOffset(4096), 4096}, Zeroing::may_free));
  must(through.flush());

  CHECK(first.content()[0] != std::byte{0});
  CHECK(first.content()[512] == std::byte{0});
  CHECK(second.content()[512] == pattern(512, 2)[0]);
  CHECK(second.flushes() == 1);
  CHECK(through.info().size == kSize);  // only the front of a longer disk
  CHECK(through.read(GuestOffset(kSize), Bytes()).has_value());
  std::byte behind{};
  CHECK(through.read(GuestOffset(kSize), {&behind, 1}).error().code() == ErrorCode::invalid);
  must(through.resize(3 * kSize));
  CHECK(through.size() == 3 * kSize);
  must(through.close());
  CHECK(second.closed());
  CHECK(!first.closed());
}

TEST_CASE("switch: a request in flight ends before the disk is exchanged") {
  class SlowDisk : public Forwarding {
   public:
    using Forwarding::Forwarding;
    std::promise<void> arrived, go;

   private:
    Result<> do_flush() override {
      arrived.set_value();
      go.get_future().wait();
      return {};
    }
  };
  MemoryDisk memory(kSize), other(kSize);
  SlowDisk slow(memory);
  Switch through(slow);
  auto flush = in_background([&] { return through.flush(); });
  slow.arrived.get_future().wait();
  auto exchange = in_background([&] {
    Standstill standstill(through);
    standstill.set_disk(other);
  });
  CHECK(waits(exchange));

  slow.go.set_value();

  exchange.get();
  must(flush.get());
  must(through.flush());
  CHECK(other.flushes() == 1);
}

TEST_CASE("switch: a request that is asked for again is one request, and took all that time") {
  class ColdDisk : public Forwarding {
   public:
    using Forwarding::Forwarding;
    bool cold = true;

   private:
    Result<> do_read(GuestOffset offset, Bytes out) override {
      if (NoWait* const hurry = NoWait::current(); cold && hurry) return hurry->miss();
      return below().read(offset, out);
    }
  };
  MemoryDisk disk(kSize);
  ColdDisk cold(disk);
  Switch through(cold);
  test::NotedFetches fetches;
  const auto first_asked = NoWait::Clock::now() - std::chrono::seconds(1);
  std::vector<std::byte> out(512);
  const auto ask = [&] {
    NoWait hurry(fetches, first_asked);
    return through.read(GuestOffset(0), out);
  };
  CHECK(ask().error().code() == ErrorCode::would_wait);
  CHECK(through.statistics().reads.requests == 0);
  CHECK(through.statistics().reads.failed == 0);

  cold.cold = false;
  must(ask());
  const RequestStatistics reads = through.statistics().reads;
  CHECK(reads.requests == 1);
  CHECK(reads.failed == 0);
  CHECK(reads.latencies[20] + reads.latencies[21] + reads.latencies[22] == 1);  // a second is 2^20 us
}

TEST_CASE("switch: while a job runs nothing is resized and no snapshot applied") {
  SnapshotMemoryDisk disk(kSize);
  Switch through(disk);
  must(through.snapshots()->create("a"));
  {
    Standstill standstill(through);
    standstill.set_job("a mirror");
  }

  CHECK(through.resize(2 * kSize).error().text() == "resize: a mirror runs on this disk");
  CHECK(through.snapshots()->apply("a").error().code() == ErrorCode::busy);
  CHECK(through.snapshots()->create("b").has_value());

  {
    Standstill standstill(through);
    standstill.set_job("");
  }
  CHECK(through.resize(2 * kSize));
  CHECK(through.snapshots()->apply("a"));
  CHECK(through.size() == disk.size());
}

TEST_CASE("switch: an open snapshot is counted until it is closed") {
  SnapshotMemoryDisk disk(kSize);
  Switch through(disk);
  Snapshots* const snapshots = through.snapshots();
  must(snapshots->create("a"));
  auto snapshot = must(snapshots->open("a"));
  CHECK(snapshot->size() == kSize);

  CHECK(Standstill(through).has_open_snapshots());
  must(snapshot->close());
  CHECK(!Standstill(through).has_open_snapshots());

  MemoryDisk plain(kSize);
  {
    Standstill standstill(through);
    standstill.set_disk(plain);
  }
  CHECK(through.snapshots() == nullptr);
  CHECK(snapshots->list().error().text() == "there are no snapshots in memory images");
}

TEST_CASE("switch: a disk is waited for while its clusters are counted") {
  class CountingDisk : public Forwarding {
   public:
    using Forwarding::Forwarding;
    std::promise<void> arrived;

   private:
    Result<> do_count_allocated(const std::atomic<bool>& stop) override {
      arrived.set_value();
      stop.wait(false);
      return {};
    }
  };
  MemoryDisk memory(kSize);
  CountingDisk disk(memory);
  Switch through(disk);
  std::atomic<bool> stop = false;
  auto counting = in_background([&] { return through.count_allocated(stop); });
  disk.arrived.get_future().wait();
  must(through.flush());  // others are not kept waiting
  auto waiting = in_background([&] { through.wait_until_counted(disk); });
  CHECK(waits(waiting));
  through.wait_until_counted(memory);

  stop = true;
  stop.notify_all();

  must(counting.get());
  waiting.get();
}

TEST_CASE("switch: what is copied in the background belongs to the disk that is behind it") {
  struct FillingDisk final : Forwarding, private BackgroundCopy {
    using Forwarding::Forwarding;
    BackgroundCopy* background_copy() override { return this; }
    Progress progress() const override { return {.state = State::running, .done = 5}; }
  };
  MemoryDisk memory(kSize);
  FillingDisk disk(memory);
  Switch through(disk);
  const BackgroundCopy* const copy = through.background_copy();
  REQUIRE(copy != nullptr);
  CHECK(copy->progress().done == 5);

  Standstill(through).set_disk(memory);

  CHECK(copy->progress().state == BackgroundCopy::State::off);
  CHECK(through.background_copy() == nullptr);
}

}  // namespace
}  // namespace imgfuse::layer
