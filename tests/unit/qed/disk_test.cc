// What is QED's own among the ways of a disk: growth of the file, NEED_CHECK, and QEMU's faults, which are not ours.
#include "format/qed/qed_disk.h"

#include <doctest/doctest.h>

#include <atomic>
#include <set>
#include <thread>

#include "qed_bytes.h"
#include "support/crash_storage.h"
#include "support/gate_storage.h"
#include "support/intercepted_storage.h"
#include "support/order_storage.h"
#include "support/qed_view.h"

namespace imgfuse::test {
namespace {

bool needs_check(const MemImage& image) { return QedView::parse(image)->needs_check(); }

/// Time passes when it is told to.
class ManualClock final : public Clock {
 public:
  Time now() const override { return Time(std::chrono::seconds(seconds_)); }
  void wait_until(ConditionVariable& condition, Lock& lock, Time) override {
    condition.wait_until(lock, std::chrono::steady_clock::now() + std::chrono::milliseconds(1));
  }
  void advance(int seconds) { seconds_ += seconds; }

 private:
  std::atomic<int> seconds_ = 100;
};

template <class Condition>
void wait_for(Condition condition) {
  for (int i = 0; i < 60000 && !condition(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  CHECK(condition());
}

// ---- QEMU's faults

TEST_CASE("qed: a write of as many clusters as a cluster has bytes links no cluster too many") {
  // QEMU divides by cluster size - 1: 4095 clusters of 4 KiB become 4096, and the entry behind them is overwritten.
  const uint64_t length = 4096 * 4096;
  const auto memory = std::make_shared<MemStorage>(make_qed({.size = 32_MiB, .cluster_size = 4096, .table_size = 16}));
  auto disk = must(open_image(memory));
  must(disk->write(GuestOffset(length), pattern(4096, 1)));
  must(disk->write(GuestOffset(length - 4096), pattern(4096, 2)));

  must(disk->write(GuestOffset(0), pattern(length - 4096, 3)));
  must(disk->write_zeroes({GuestOffset(length + 8192), 4096 * 2048}, Zeroing::keep_allocation));

  CHECK(read_all(*disk, GuestOffset(length), 4096) == pattern(4096, 1));
  CHECK(read_all(*disk, GuestOffset(length - 4096), 4096) == pattern(4096, 2));
  CHECK(read_all(*disk, GuestOffset(0), length - 4096) == pattern(length - 4096, 3));
  must(disk->close());
  const CheckReport report = check_image(memory->image());
  CHECK(report.clean());  // where QEMU's check counts a phantom leak
  CHECK(report.allocated_clusters == 4097);
}

TEST_CASE("qed: the backing file does not come back in a zero cluster that is written in part") {
  const MemImage backing = [] {
    MemImage content;
    content.write(0, pattern(1_MiB, 1));
    return content;
  }();
  const WatchedDisk disk = open_watched(make_qed({.size = 1_MiB, .backing = "base"}), {.backing = backing});
  must(disk->write_zeroes({GuestOffset(64_KiB), 64_KiB}, Zeroing::may_free));

  must(disk->write(GuestOffset(64_KiB + 512), pattern(512, 2)));

  std::vector<std::byte> expected(64_KiB);
  std::ranges::copy(pattern(512, 2), expected.begin() + 512);
  CHECK(read_all(*disk.disk, GuestOffset(64_KiB), 64_KiB) == expected);
  must(disk->close());
}

TEST_CASE("qed: images whose tables have one cluster are opened and written") {
  const WatchedDisk disk = open_watched(make_qed({.size = 8_MiB, .cluster_size = 4096, .table_size = 1}));
  for (uint64_t at = 0; at < 8_MiB; at += 1_MiB) must(disk->write(GuestOffset(at), pattern(5000, at)));
  for (uint64_t at = 0; at < 8_MiB; at += 1_MiB)
    CHECK(read_all(*disk.disk, GuestOffset(at), 5000) == pattern(5000, at));
  must(disk->close());
  CHECK(check_image(disk.memory->image()).clean());
}

TEST_CASE("qed: a disk is as large as it says where table sizes multiply to 2^64") {
  const auto memory = std::make_shared<MemStorage>(make_qed({.size = 1_TiB, .cluster_size = 4 << 20, .table_size = 4}));
  auto disk = must(open_image(memory));
  CHECK(disk->size() == 1_TiB);
  must(disk->write(GuestOffset(1_TiB - 512), pattern(512)));
  CHECK(read_all(*disk, GuestOffset(1_TiB - 512), 512) == pattern(512));
  must(disk->close());
}

// ---- The end of the file

TEST_CASE("qed: bytes of a torn last cluster do not show in the cluster that takes its place") {
  QedSample s;
  s.image.write(QedSample::kEnd, pattern(30000, 9));
  const auto memory = std::make_shared<MemStorage>(s.image);
  auto disk = must(open_image(std::make_shared<OrderStorage>(memory)));

  must(disk->write(GuestOffset(640_KiB), pattern(512, 1)));

  const auto extents = must(disk->map({GuestOffset(640_KiB), 512}));
  CHECK(extents.at(0).host == HostOffset(QedSample::kEnd));
  CHECK(read_all(*disk, GuestOffset(640_KiB + 512), 60000) == std::vector<std::byte>(60000));
  must(disk->close());
  CHECK(memory->image().size() == QedSample::kEnd + 65536);
}

TEST_CASE("qed: a zero cluster takes no space, and a cluster that is zeroed keeps its place") {
  QedSample s("base");
  MemImage backing;
  backing.write(0, pattern(1_MiB, 4));
  const auto memory = std::make_shared<MemStorage>(s.image);
  auto disk = must(open_image(std::make_shared<OrderStorage>(memory), {.backing = backing}));

  must(disk->write_zeroes({GuestOffset(0), 1_MiB}, Zeroing::may_free));

  CHECK(read_all(*disk, GuestOffset(0), 1_MiB) == std::vector<std::byte>(1_MiB));
  must(disk->close());
  CHECK(memory->image().size() == QedSample::kEnd);
  for (uint64_t cluster = 0; cluster < 16; ++cluster)
    CHECK(peek_le<uint64_t>(memory->image(), QedSample::kL2 + cluster * 8) == (s.l2(cluster) > 1 ? s.l2(cluster) : 1));
}

TEST_CASE("qed: shrinking and preallocation are refused by name") {
  auto disk = must(open_image(std::make_shared<MemStorage>(make_qed({.size = 1_MiB}))));
  CHECK(disk->resize(512_KiB, {.shrink = true}).error().text() == "a QED image cannot shrink, from 1048576 to 524288");
  CHECK(disk->resize(2_MiB, {.preallocation = Preallocation::full}).error().code() == ErrorCode::unsupported);
  CHECK(disk->resize(64_TiB + 512).error().text().find("largest disk") != std::string::npos);
  must(disk->close());
}

// ---- NEED_CHECK

TEST_CASE("qed: NEED_CHECK is durable before the first allocating write, and goes at a clean close") {
  auto crash = std::make_shared<CrashStorage>(make_qed({.size = 1_MiB}));
  auto disk = must(open_image(crash));
  must(disk->flush());
  CHECK_FALSE(needs_check(crash->image()));

  must(disk->write(GuestOffset(0), pattern(512)));

  CHECK(needs_check(crash->crash(uint64_t{0})));  // nothing that is not flushed survives
  must(disk->close());
  CHECK_FALSE(needs_check(crash->crash(uint64_t{0})));
}

TEST_CASE("qed: a zero write sets NEED_CHECK too, an overwrite does not, and nothing does with a backing file") {
  MemImage backing;
  backing.write(0, pattern(1_MiB));
  QedSample s;
  poke_le<uint64_t>(s.image, QedSample::kL1, QedSample::kL2);
  const auto memory = std::make_shared<MemStorage>(s.image);
  auto disk = must(open_image(memory));
  must(disk->write(GuestOffset(0), pattern(512)));
  must(disk->write_zeroes({GuestOffset(640_KiB), 64_KiB}, Zeroing::may_free));  // reads as zeros already
  CHECK_FALSE(needs_check(memory->image()));
  must(disk->populate({GuestOffset(640_KiB), 64_KiB}));
  CHECK(needs_check(memory->image()));
  must(disk->close());

  const auto overlay = std::make_shared<MemStorage>(make_qed({.size = 1_MiB, .backing = "base"}));
  disk = must(open_image(overlay, {.backing = backing}));
  must(disk->write(GuestOffset(0), pattern(512)));
  must(disk->write_zeroes({GuestOffset(64_KiB), 64_KiB}, Zeroing::may_free));
  must(disk->flush());
  CHECK(features_of(overlay->image()) == 5);
  must(disk->close());
}

TEST_CASE("qed: NEED_CHECK goes after a flush when no table has changed for five seconds") {
  ManualClock clock;
  auto crash = std::make_shared<CrashStorage>(make_qed({.size = 1_MiB}));
  auto disk = must(open_image(crash, {.clock = &clock}));
  must(disk->write(GuestOffset(0), pattern(512, 1)));
  clock.advance(4);
  must(disk->write(GuestOffset(64_KiB), pattern(512, 2)));
  clock.advance(4);
  CHECK(needs_check(crash->crash(uint64_t{0})));

  clock.advance(2);

  wait_for([&] { return !needs_check(crash->crash(uint64_t{0})); });
  wait_for([&] { return crash->pending() == 0; });
  auto crashed = must(open_image(std::make_shared<MemStorage>(crash->crash(uint64_t{0})), {.read_only = true}));
  CHECK(read_all(*crashed, GuestOffset(64_KiB), 512) == pattern(512, 2));

  must(disk->write(GuestOffset(128_KiB), pattern(512, 3)));
  CHECK(needs_check(crash->crash(uint64_t{0})));
  must(disk->close());
}

TEST_CASE("qed: a table that changes while the image is being marked as clean keeps the mark away") {
  ManualClock clock;
  auto memory = std::make_shared<MemStorage>(make_qed({.size = 1_MiB}));
  auto gates = std::make_shared<GateStorage>(std::make_shared<OrderStorage>(memory));
  auto disk = must(open_image(gates, {.clock = &clock}));
  must(disk->write(GuestOffset(0), pattern(512, 1)));
  const auto gate = gates->hold(Call::flush);
  clock.advance(6);
  gate->wait_for_arrival();  // the idle timer's flush

  must(disk->write(GuestOffset(64_KiB), pattern(512, 2)));
  gate->open();
  must(disk->flush());

  CHECK(needs_check(memory->image()));
  clock.advance(6);
  wait_for([&] { return !needs_check(memory->image()); });
  must(disk->close());
}

TEST_CASE("qed: a write that takes longer than the idle time is durable before NEED_CHECK goes") {
  ManualClock clock;
  auto crash = std::make_shared<CrashStorage>(make_qed({.size = 1_MiB}));
  auto gates = std::make_shared<GateStorage>(crash);
  auto disk = must(open_image(gates, {.clock = &clock}));
  const auto gate = gates->hold(Call::write, Point::after, [](HostRange range) { return range.length == 3000; });
  auto write = in_background([&] { return disk->write(GuestOffset(0), pattern(3000, 1)); });
  gate->wait_for_arrival();  // the bit is set, the table has not changed
  clock.advance(6);
  CHECK(waits(write));  // and the idle timer meets it

  gate->open();
  must(write.get());
  wait_for([&] { return !needs_check(crash->crash(uint64_t{0})); });
  auto crashed = must(open_image(std::make_shared<MemStorage>(crash->crash(uint64_t{0})), {.read_only = true}));
  CHECK(read_all(*crashed, GuestOffset(0), 3000) == pattern(3000, 1));
  must(disk->close());
}

TEST_CASE("qed: after a failed flush NEED_CHECK stays") {
  auto memory = std::make_shared<MemStorage>(make_qed({.size = 1_MiB}));
  struct NoFlush final : InterceptedStorage {
    using InterceptedStorage::InterceptedStorage;
    Result<> before(Call call, HostRange) override {
      if (call == Call::flush && broken) return fail(ErrorCode::io, "no flush");
      return {};
    }
    std::atomic<bool> broken = false;
  };
  auto storage = std::make_shared<NoFlush>(memory);
  auto disk = must(open_image(storage));
  must(disk->write(GuestOffset(0), pattern(512)));
  storage->broken = true;
  CHECK_FALSE(disk->close());
  CHECK(needs_check(memory->image()));
}

TEST_CASE("qed: an image that needs a check is repaired when it is opened for writing, and only then") {
  QedSample s;
  s.set_l2(1, QedSample::kEnd);  // never flushed
  poke_le<uint64_t>(s.image, kFeaturesAt, 2);
  const auto memory = std::make_shared<MemStorage>(s.image);
  auto disk = must(open_image(memory, {.read_only = true}));
  std::vector<std::byte> sector(512);
  CHECK_FALSE(disk->read(GuestOffset(65536), sector));
  must(disk->close());
  CHECK(needs_check(memory->image()));

  disk = must(open_image(memory));

  CHECK_FALSE(needs_check(memory->image()));
  CHECK(read_all(*disk, GuestOffset(65536), 512) == std::vector<std::byte>(512));
  CHECK(read_all(*disk, GuestOffset(0), 512) == read_all(*make_raw_disk(s.content()), GuestOffset(0), 512));
  must(disk->close());
}

TEST_CASE("qed: an image with damage that cannot be repaired is not opened for writing") {
  QedSample s;
  s.set_l2(1, QedSample::kData);  // twice
  poke_le<uint64_t>(s.image, kFeaturesAt, 2);
  const auto memory = std::make_shared<MemStorage>(s.image);

  const auto disk = open_image(memory);

  REQUIRE(!disk);
  CHECK(disk.error().text().find("1 damaged entries could not be repaired") != std::string::npos);
  CHECK(needs_check(memory->image()));
}

// ---- Costs

TEST_CASE("qed: an fsync costs one host flush after writes in place, and two after allocating ones") {
  const auto memory = std::make_shared<MemStorage>(make_qed({.size = 1_GiB}));
  auto disk = must(open_image(memory));
  must(disk->write(GuestOffset(0), pattern(512)));
  must(disk->flush());

  for (uint64_t at = 1_MiB; at < 8_MiB; at += 1_MiB) {
    memory->counts().reset();
    must(disk->write(GuestOffset(at), pattern(4096)));
    must(disk->flush());
    CHECK(memory->counts().flushes == 2);
    memory->counts().reset();
    must(disk->write(GuestOffset(at), pattern(4096)));
    must(disk->flush());
    CHECK(memory->counts().flushes == 1);
  }
  must(disk->close());
}

TEST_CASE("qed: the default cache keeps all tables of a 100 GiB disk with clusters of 64 KiB") {
  const auto memory = std::make_shared<MemStorage>(make_qed({.size = 100_GiB}));
  auto disk = must(qed::open(memory, {.open_backing = {}}));
  for (uint64_t at = 0; at < 100_GiB; at += 2_GiB) must(disk->write(GuestOffset(at), pattern(512)));
  must(disk->flush());
  const auto read_everywhere = [&] {
    std::vector<std::byte> sector(512);
    for (uint64_t at = 64_KiB; at < 100_GiB; at += 32_MiB) must(disk->read(GuestOffset(at), sector));
  };
  read_everywhere();
  memory->counts().reset();

  read_everywhere();

  CHECK(memory->counts().reads == 0);
  must(disk->close());
}

/// Counts tables that are being read twice at the same time.
class TwiceStorage final : public InterceptedStorage {
 public:
  using InterceptedStorage::InterceptedStorage;
  std::atomic<uint64_t> reads = 0, twice = 0;

 private:
  Result<> before(Call call, HostRange range) override {
    if (call != Call::read) return {};
    Lock lock(mutex_);
    ++reads;
    if (!active_.insert(range.begin.bytes()).second) ++twice;
    return {};
  }
  void after(Call call, HostRange range) override {
    if (call != Call::read) return;
    std::this_thread::yield();
    Lock lock(mutex_);
    active_.erase(range.begin.bytes());
  }
  Mutex mutex_;
  std::set<uint64_t> active_ GUARDED_BY(mutex_);
};

TEST_CASE("qed: eight threads that look up a TiB with a cache for a tenth read no table twice at the same time") {
  // 512 L2 tables of 256 KiB: every slice is there, and maps nothing.
  MemImage image = make_qed({.size = 1_TiB});
  const uint64_t table = 4 * 65536;
  image.resize(0x50000 + 512 * table);
  for (uint64_t i = 0; i < 512; ++i) poke_le<uint64_t>(image, 0x10000 + i * 8, 0x50000 + i * table);
  const auto storage = std::make_shared<TwiceStorage>(std::make_shared<MemStorage>(image));
  auto disk = must(qed::open(storage, {.read_only = true, .metadata_cache = 512 * table / 10, .open_backing = {}}));
  storage->reads = 0;

  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 8; ++t)
    threads.emplace_back([&, t] {
      Rng rng(base_seed() + t / 2);  // pairs of threads look for the same tables
      std::vector<std::byte> sector(512);
      for (int i = 0; i < 20000; ++i)
        if (!disk->read(GuestOffset(rng.below(1_TiB / 512) * 512), sector)) storage->twice += 1000000;
    });
  for (std::thread& thread : threads) thread.join();

  CHECK(storage->twice == 0);
  CHECK(storage->reads > 10000);  // of 160,000 lookups nine in ten miss, at most one of each pair
  const DiskStatistics statistics = disk->statistics();
  CHECK(statistics.tables <= 512 * table / 10 / 4096);
  CHECK(statistics.table_loads == storage->reads);
  must(disk->close());
}

}  // namespace
}  // namespace imgfuse::test
