// Compressed clusters that are inflated before a sequential reader asks for them.
#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <thread>

#include "base/endian.h"
#include "imgfuse/snapshots.h"
#include "support/builders.h"
#include "support/gate_storage.h"
#include "support/order_storage.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kCluster = 4096;
constexpr uint64_t kSize = 1_MiB;
constexpr uint64_t kRequest = 128_KiB;
constexpr uint64_t kWindow = 128_KiB;
constexpr uint64_t kCache = 8 * kWindow;
/// The first cluster that is inflated ahead of a reader that has read three requests from the beginning.
constexpr uint64_t kAhead = 3 * kRequest;

class ReadLog final : public InterceptedStorage {
 public:
  using InterceptedStorage::InterceptedStorage;
  HostRange last;

 private:
  Result<> before(Call call, HostRange range) override {
    if (call == Call::read) last = range;
    return {};
  }
};

/// Where the stream of the cluster at `guest` lies.
HostRange stream_of(const std::shared_ptr<Storage>& storage, uint64_t guest) {
  const auto log = std::make_shared<ReadLog>(storage);
  const auto disk = must(open_qcow2(log, {.read_only = true, .compressed_cache = 0}));
  read_all(*disk, GuestOffset(guest), 512);
  return log->last;
}

/// Its whole disk holds compressed clusters.
struct Packed {
  explicit Packed(uint64_t cache = kCache) {
    memory = std::make_shared<MemStorage>(make_qcow2({.size = kSize, .cluster_size = kCluster}));
    gates = std::make_shared<GateStorage>(std::make_shared<OrderStorage>(memory));
    disk = must(open_qcow2(gates, {.compress = "zlib", .compressed_cache = cache}));
    must(disk->write(GuestOffset(0), data));
    must(disk->flush());
    memory->counts().reset();
  }
  /// Holds who inflates the first cluster ahead.
  std::shared_ptr<Gate> hold_ahead(Point point = Point::after) {
    const HostRange stream = stream_of(memory, kAhead);
    return gates->hold(Call::read, point, [stream](HostRange range) { return range == stream; });
  }
  void read(uint64_t begin, uint64_t end) {
    for (uint64_t at = begin; at < end; at += kRequest)
      CHECK(read_all(*disk, GuestOffset(at), kRequest) == part(at, kRequest));
  }
  std::vector<std::byte> part(uint64_t offset, uint64_t length) const {
    return {data.begin() + static_cast<ptrdiff_t>(offset), data.begin() + static_cast<ptrdiff_t>(offset + length)};
  }
  void wait_for_reads(uint64_t count) const {
    while (memory->counts().reads < count) std::this_thread::yield();
  }
  void close() {
    must(disk->close());
    CHECK(check_image(memory->image()).clean());
  }

  const std::vector<std::byte> data = loose_pattern(kSize, 5);
  std::shared_ptr<MemStorage> memory;
  std::shared_ptr<GateStorage> gates;
  std::unique_ptr<Disk> disk;
};

TEST_CASE("qcow2: a sequential reader finds compressed clusters inflated, each of them once") {
  Packed p;

  p.read(0, 2 * kRequest);  // enough of a sequence
  for (uint64_t done = 2 * kRequest; done < kSize; done += kRequest) {
    p.wait_for_reads(std::min(done + kWindow, kSize) / kCluster);
    p.read(done, done + kRequest);
  }

  CHECK(p.memory->counts().reads == kSize / kCluster);
  p.close();
}

TEST_CASE("qcow2: nothing is inflated ahead without a cache that has room for it") {
  for (const uint64_t cache : {0_KiB, 32_KiB}) {
    Packed p(cache);

    p.read(0, 4 * kRequest);

    CHECK(p.memory->counts().reads == 4 * kRequest / kCluster);
    p.close();
  }
}

TEST_CASE("qcow2: a reader waits for the cluster that is being inflated ahead of it") {
  Packed p;
  const auto gate = p.hold_ahead();
  p.read(0, kAhead);
  gate->wait_for_arrival();

  auto whole = in_background([&] { return read_all(*p.disk, GuestOffset(kAhead), kCluster); });
  auto piece = in_background([&] { return read_all(*p.disk, GuestOffset(kAhead + 512), 512); });
  CHECK(waits(whole));
  CHECK(waits(piece));

  gate->open();
  CHECK(whole.get() == p.part(kAhead, kCluster));
  CHECK(piece.get() == p.part(kAhead + 512, 512));
  p.close();
}

TEST_CASE("qcow2: who changes a cluster that is being inflated ahead waits, and nobody reads the old bytes then") {
  const auto fresh = loose_pattern(kCluster, 99);
  const std::vector<std::function<Result<>(Disk&)>> changes = {
      [&](Disk& disk) { return disk.write(GuestOffset(kAhead), fresh); },
      [&](Disk& disk) { return disk.write(GuestOffset(kAhead), ConstBytes(fresh).first(512)); },
      [&](Disk& disk) {
        return disk.discard({GuestOffset(kAhead), kCluster});
      },
      [&](Disk& disk) {
        return disk.write_zeroes({GuestOffset(kAhead), kCluster}, Zeroing::keep_allocation);
      },
      [&](Disk& disk) { return disk.resize(kAhead, {.shrink = true}); },
  };
  for (size_t i = 0; i < changes.size(); ++i) {
    CAPTURE(i);
    Packed p;
    auto expected = i < 2 ? fresh : std::vector<std::byte>(kCluster);
    if (i == 1) {
      expected = p.part(kAhead, kCluster);
      std::copy_n(fresh.begin(), 512, expected.begin());
    }
    const auto gate = p.hold_ahead();
    p.read(0, kAhead);
    gate->wait_for_arrival();

    auto change = in_background([&] { return changes[i](*p.disk); });
    CHECK(waits(change));

    gate->open();
    must(change.get());
    must(p.disk->flush());  // its host space may be used again
    if (p.disk->size() == kAhead) must(p.disk->resize(kSize));
    CHECK(read_all(*p.disk, GuestOffset(kAhead), kCluster) == expected);
    must(p.disk->write(GuestOffset(0), loose_pattern(kAhead, 3)));
    CHECK(read_all(*p.disk, GuestOffset(kAhead), kCluster) == expected);
    p.close();
  }
}

TEST_CASE("qcow2: applying a snapshot waits for what is inflated ahead, and shows nothing of it") {
  Packed p;
  must(p.disk->snapshots()->create("then"));
  const auto now = loose_pattern(kSize, 6);
  must(p.disk->write(GuestOffset(0), now));
  must(p.disk->flush());
  const auto gate = p.hold_ahead();
  for (uint64_t at = 0; at < kAhead; at += kRequest) read_all(*p.disk, GuestOffset(at), kRequest);
  gate->wait_for_arrival();

  auto apply = in_background([&] { return p.disk->snapshots()->apply("then"); });
  CHECK(waits(apply));

  gate->open();
  must(apply.get());
  p.read(0, kSize);
  p.close();
}

TEST_CASE("qcow2: closing waits for what is inflated ahead") {
  Packed p;
  const auto gate = p.hold_ahead();
  p.read(0, kAhead);
  gate->wait_for_arrival();

  auto close = in_background([&] { return p.disk->close(); });
  CHECK(waits(close));

  gate->open();
  must(close.get());
}

TEST_CASE("qcow2: a damaged stream ahead of a reader is an error when it is read, and not before") {
  Packed p;
  const HostRange stream = stream_of(p.memory, kAhead);
  must(p.memory->write(stream.begin, std::vector<std::byte>(16, std::byte{0xff})));
  const auto gate = p.gates->hold(Call::read, Point::after, [=](HostRange range) { return range == stream; });
  p.read(0, kAhead);
  gate->wait_for_arrival();

  auto read = in_background([&] {
    std::vector<std::byte> bytes(kRequest);
    return p.disk->read(GuestOffset(kAhead), bytes);
  });
  CHECK(waits(read));  // for who inflates it, whose error is not the reader's
  gate->open();

  const Result<> result = read.get();
  REQUIRE_FALSE(result);
  CHECK(result.error().code() == ErrorCode::corrupt);
  CHECK(result.error().text().find("for guest offset 0x60000") != std::string::npos);
  p.read(kAhead + kRequest, kSize);
  must(p.disk->write(GuestOffset(kAhead), ConstBytes(p.data).subspan(kAhead, kCluster)));
  must(p.disk->flush());
  p.read(0, kSize);
  p.close();
}

TEST_CASE("qcow2: a damaged entry ahead of a reader does not keep anybody from reading and writing elsewhere") {
  Packed p;
  must(p.disk->close());
  MemImage image = p.memory->image();
  const auto field = [&](uint64_t at) {
    be<uint64_t> value;
    image.read(at, std::as_writable_bytes(std::span(&value, 1)));
    return uint64_t{value};
  };
  const uint64_t table = field(field(40)) & 0x00fffffffffffe00;
  image.write(table + kAhead / kCluster * 8, std::vector<std::byte>(8, std::byte{0xff}));
  const auto memory = std::make_shared<MemStorage>(image);
  const auto disk = must(open_qcow2(memory, {.compress = "zlib", .compressed_cache = kCache}));

  for (uint64_t at = 0; at < kAhead; at += kRequest)
    CHECK(read_all(*disk, GuestOffset(at), kRequest) == p.part(at, kRequest));
  must(disk->write(GuestOffset(0), loose_pattern(kCluster, 9)));
  must(disk->flush());

  std::vector<std::byte> bytes(kCluster);
  CHECK_FALSE(disk->read(GuestOffset(kAhead), bytes));
  (void)disk->close();
}

TEST_CASE("qcow2: sequential readers that race overwriting and discarding see nothing that is older") {
  constexpr uint64_t kClusters = kSize / kCluster;
  constexpr uint64_t kRounds = 600;
  Packed p;
  struct Rounds {
    std::atomic<uint64_t> begun = 0, done = 0;
  };
  std::array<Rounds, kClusters> rounds;
  const auto content = [](uint64_t c, uint64_t round) {
    if (round % 3 == 2) return std::vector<std::byte>(kCluster);
    return loose_pattern(kCluster, c + round * 1000);
  };
  for (uint64_t c = 0; c < kClusters; ++c) must(p.disk->write(GuestOffset(c * kCluster), content(c, 0)));

  std::atomic<bool> stop = false;
  std::atomic<uint64_t> wrong = 0;
  std::vector<std::thread> readers;
  for (uint64_t i = 0; i < 2; ++i)
    readers.emplace_back([&, i] {
      std::array<uint64_t, kClusters> oldest{};
      for (uint64_t at = i * kRequest; !stop; at = (at + kRequest) % kSize) {
        const uint64_t first = at / kCluster;
        for (uint64_t c = first; c < first + kRequest / kCluster; ++c) oldest[c] = rounds[c].done;
        const auto read = read_all(*p.disk, GuestOffset(at), kRequest);
        for (uint64_t c = first; c < first + kRequest / kCluster; ++c) {
          const auto* own = read.data() + (c - first) * kCluster;
          bool known = false;
          for (uint64_t r = oldest[c]; r <= rounds[c].begun && !known; ++r) {
            const auto then = content(c, r);
            known = std::equal(then.begin(), then.end(), own);
          }
          wrong += !known;
        }
      }
    });
  Rng rng(base_seed());
  for (uint64_t r = 1; r <= kRounds; ++r) {
    const uint64_t c = rng.below(kClusters);
    const uint64_t next = rounds[c].begun + 1;
    rounds[c].begun = next;
    if (next % 3 == 2) {
      must(p.disk->discard({GuestOffset(c * kCluster), kCluster}));
    } else {
      must(p.disk->write(GuestOffset(c * kCluster), content(c, next)));
    }
    rounds[c].done = next;
    if (r % 4 == 0) must(p.disk->flush());
  }
  stop = true;
  for (std::thread& reader : readers) reader.join();

  CHECK(wrong == 0);
  p.close();
}

}  // namespace
}  // namespace imgfuse::test
