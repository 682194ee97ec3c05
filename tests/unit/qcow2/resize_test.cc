// Shrinking, and growing with preallocation.
#include <doctest/doctest.h>

#include <atomic>

#include "base/endian.h"
#include "imgfuse/snapshots.h"
#include "qemu.h"
#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/fault_storage.h"
#include "support/gate_storage.h"
#include "support/order_storage.h"
#include "support/qcow2_view.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kSize = 2_MiB;
constexpr uint64_t kSmall = 300_KiB + 512;  // inside a cluster

/// Full of data; small clusters, so that there are several L2 tables.
MemImage full_image(bool extended_l2, uint64_t size = kSize) {
  Qcow2Spec spec{.size = size, .cluster_size = extended_l2 ? 16384u : 512u};
  spec.extended_l2 = extended_l2;
  auto memory = std::make_shared<MemStorage>(make_qcow2(spec));
  auto disk = must(open_qcow2(memory));
  must(disk->write(GuestOffset(0), pattern(size)));
  must(disk->close());
  return memory->image();
}

std::vector<std::byte> front(uint64_t length) {
  std::vector<std::byte> bytes = pattern(kSize);
  bytes.resize(length);
  return bytes;
}

}  // namespace

TEST_CASE("qcow2: a disk that shrinks frees what lies behind its end, and does not show it again") {
  for (const bool extended : {false, true}) {
    CAPTURE(extended);
    const MemImage image = full_image(extended);
    WatchedDisk disk = open_watched(image);
    must(disk->resize(kSmall, {.shrink = true}));
    CHECK(disk->size() == kSmall);
    CHECK(read_all(*disk.disk, GuestOffset(0), kSmall) == front(kSmall));
    must(disk->resize(kSize));
    std::vector<std::byte> expected = front(kSmall);
    expected.resize(kSize);
    CHECK(read_all(*disk.disk, GuestOffset(0), kSize) == expected);
    must(disk->close());
    const CheckReport report = check_image(disk.memory->image());
    CHECK(report.clean());
    CHECK(report.allocated_clusters * (extended ? 16384 : 512) < kSmall + 16384);
  }
}

TEST_CASE("qcow2: the file ends with what is left of a disk that shrinks") {
  for (const uint32_t cluster_size : {512u, 4096u, 65536u})
    for (const bool lazy : {false, true}) {
      CAPTURE(cluster_size);
      CAPTURE(lazy);
      Qcow2Spec spec{.size = 8_MiB, .cluster_size = cluster_size, .lazy_refcounts = lazy};
      WatchedDisk disk = open_watched(make_qcow2(spec));
      for (uint64_t at = 0; at < 8_MiB; at += 512_KiB) must(disk->write(GuestOffset(at), pattern(320_KiB, at)));
      must(disk->flush());
      const uint64_t full = must(disk.memory->size());
      CHECK(full > 5_MiB);  // with small clusters past the blocks that are made at once
      must(disk->resize(384_KiB, {.shrink = true}));
      CHECK(must(disk.memory->size()) < full / 3);
      CHECK(read_all(*disk.disk, GuestOffset(0), 320_KiB) == pattern(320_KiB, 0));
      must(disk->resize(8_MiB));
      CHECK(read_all(*disk.disk, GuestOffset(512_KiB), 256_KiB) == std::vector<std::byte>(256_KiB));
      for (uint64_t at = 512_KiB; at < 5_MiB; at += 512_KiB) must(disk->write(GuestOffset(at), pattern(128_KiB, at)));
      must(disk->flush());
      CHECK(read_all(*disk.disk, GuestOffset(1_MiB), 128_KiB) == pattern(128_KiB, 1_MiB));
      must(disk->close());
      CHECK(must(disk.memory->size()) < full);
      CHECK(check_image(disk.memory->image()).clean());
      if (have_qemu()) CHECK(qemu_check(disk.memory->image()).status == 0);
    }
}

TEST_CASE("qcow2: a discard leaves the file as long as it is") {
  WatchedDisk disk = open_watched(full_image(false));
  const uint64_t size = must(disk.memory->size());
  must(disk->discard({GuestOffset(0), kSize}));
  for (int i = 0; i < 2; ++i) must(disk->flush());
  CHECK(must(disk.memory->size()) == size);
  must(disk->close());
  CHECK(must(disk.memory->size()) == size);
}

TEST_CASE("qcow2: a version 2 disk keeps its size while it has snapshots, and no longer") {
  WatchedDisk disk = open_watched(make_qcow2({.size = kSize, .version = 2}));
  (void)must(disk->snapshots()->create("one"));
  CHECK(disk->resize(2 * kSize).error().code() == ErrorCode::unsupported);
  must(disk->snapshots()->remove("one"));
  must(disk->resize(2 * kSize));
  must(disk->close());
  CHECK(check_image(disk.memory->image()).clean());
}

TEST_CASE("qcow2: damage met by resizing marks the image corrupt") {
  MemImage image = full_image(false);
  be<uint64_t> l1_offset, last;
  image.read(40, std::as_writable_bytes(std::span(&l1_offset, 1)));
  const uint64_t place = l1_offset + (kSize / 32_KiB - 1) * 8;  // what shrinking drops
  image.read(place, std::as_writable_bytes(std::span(&last, 1)));
  const be<uint64_t> entry(uint64_t{0x100});
  image.write(last & 0x00fffffffffffe00, std::as_bytes(std::span(&entry, 1)));
  auto memory = std::make_shared<MemStorage>(image);
  auto disk = must(open_qcow2(memory));
  CHECK(disk->resize(kSmall, {.shrink = true}).error().code() == ErrorCode::corrupt);
  CHECK(!disk->flush());
  CHECK(!disk->close());
  be<uint64_t> incompatible;
  memory->image().read(72, std::as_writable_bytes(std::span(&incompatible, 1)));
  CHECK(incompatible == 2);
}

TEST_CASE("qcow2: what a snapshot holds stays when the disk shrinks") {
  const std::optional<MemImage> image = with_snapshot(full_image(false));
  if (!image) return;
  WatchedDisk disk = open_watched(*image);
  must(disk->resize(kSmall, {.shrink = true}));
  must(disk->close());
  const std::optional<Qcow2View> view = Qcow2View::parse(disk.memory->image());
  REQUIRE(view);
  CHECK(view->find_corruption().empty());
  CHECK(check_image(disk.memory->image()).clean());
}

TEST_CASE("qcow2: a crash while a disk shrinks leaves the old size or the new one, and leaks at most") {
  for (const bool extended : {false, true}) {
    CAPTURE(extended);
    const MemImage image = full_image(extended);
    auto storage = std::make_shared<CrashStorage>(image);
    auto disk = must(open_qcow2(std::make_shared<OrderStorage>(storage, image)));
    Rng rng(7);
    std::vector<MemImage> crashed;
    storage->set_observer([&] {
      for (const CrashMode mode : kCrashModes) crashed.push_back(storage->crash(mode, rng));
    });
    must(disk->resize(kSmall, {.shrink = true}));
    must(disk->close());
    storage->set_observer({});
    REQUIRE(crashed.size() > 20);
    for (const MemImage& left : crashed) {
      const std::optional<Qcow2View> view = Qcow2View::parse(left);
      REQUIRE(view);
      CHECK(view->find_corruption() == "");
      auto reopened = must(open_qcow2(std::make_shared<MemStorage>(left), {.read_only = true}));
      const uint64_t size = reopened->size();
      CHECK((size == kSize || size == kSmall));
      CHECK(read_all(*reopened, GuestOffset(0), kSmall) == front(kSmall));
    }
  }
}

TEST_CASE("qcow2: shrinking may fail at any call") {
  const MemImage image = full_image(false, 2 * kSmall);
  for (uint64_t n = 1;; n += fault_step()) {
    CAPTURE(n);
    auto memory = std::make_shared<MemStorage>(image);
    auto faults = std::make_shared<FaultStorage>(memory);
    auto disk = must(open_qcow2(std::make_shared<OrderStorage>(faults, image)));
    faults->fail_call(n, ErrorCode::io);
    const bool done = disk->resize(kSmall, {.shrink = true}).has_value();
    const bool fired = faults->fired();
    faults->heal();
    CHECK(read_all(*disk, GuestOffset(0), kSmall) == front(kSmall));
    (void)disk->close();  // an error if the disk latched
    CHECK(check_image(memory->image()).corruptions == 0);
    if (!fired) {
      CHECK(done);
      break;
    }
  }
}

TEST_CASE("qcow2: what is added to a disk can be preallocated") {
  for (const Preallocation preallocation : {Preallocation::metadata, Preallocation::falloc, Preallocation::full}) {
    WatchedDisk disk = open_watched(full_image(true));
    must(disk->resize(kSize + 1_MiB, {.preallocation = preallocation}));
    std::vector<std::byte> expected = front(kSize);
    expected.resize(kSize + 1_MiB);
    CHECK(read_all(*disk.disk, GuestOffset(0), kSize + 1_MiB) == expected);
    for (const Extent& extent : must(disk->map({GuestOffset(kSize), 1_MiB}))) CHECK(extent.allocated);
    must(disk->close());
    CHECK(check_image(disk.memory->image()).clean());
  }
}

TEST_CASE("qcow2: a disk with clusters of 512 bytes grows to the largest size of the format") {
  for (const uint32_t bits : {1u, 16u, 64u}) {
    CAPTURE(bits);
    auto memory = std::make_shared<MemStorage>(make_qcow2({.size = 1_MiB, .cluster_size = 512, .refcount_bits = bits}));
    auto disk = must(open_qcow2(memory));
    must(disk->write(GuestOffset(0), pattern(1_MiB)));
    must(disk->resize(128_GiB));  // 32 MiB of L1 table
    CHECK(disk->resize(128_GiB + 512).error().code() == ErrorCode::invalid);
    must(disk->write(GuestOffset(128_GiB - 5000), pattern(5000, 1)));
    CHECK(read_all(*disk, GuestOffset(0), 1_MiB) == pattern(1_MiB));
    CHECK(read_all(*disk, GuestOffset(128_GiB - 5000), 5000) == pattern(5000, 1));
    must(disk->close());
    CHECK(check_image(memory->image()).clean());
    if (have_qemu()) CHECK(qemu_check(memory->image()).status == 0);
  }
}

TEST_CASE("qcow2: a crash while a long L1 table is placed behind everything leaks at most") {
  for (const bool lazy : {false, true}) {
    CAPTURE(lazy);
    const MemImage image =
        make_qcow2({.size = 1_MiB, .cluster_size = 512, .refcount_bits = 64, .lazy_refcounts = lazy});
    auto storage = std::make_shared<CrashStorage>(image);
    auto disk = must(open_qcow2(std::make_shared<OrderStorage>(storage, image)));
    must(disk->write(GuestOffset(0), pattern(64_KiB)));
    must(disk->flush());
    Rng rng(base_seed());
    uint64_t states = 0;
    uint64_t size = 1_MiB, next_size = size;
    const auto look = [&](MemImage left) {
      if (Qcow2View::parse(left)->is_lazy()) left = reopened(left);
      CHECK(check_image(left).corruptions == 0);
      auto reader = must(open_qcow2(std::make_shared<MemStorage>(left), {.read_only = true}));
      CHECK((reader->size() == size || reader->size() == next_size));
      CHECK(read_all(*reader, GuestOffset(0), 64_KiB) == pattern(64_KiB));
      ++states;
    };
    // Another thread looks, as this one holds locks of the interrupted disk.
    storage->set_observer([&] {
      for (const CrashMode mode : {CrashMode::all, CrashMode::torn})
        in_background([&] { look(storage->crash(mode, rng)); }).get();
    });
    // By turns the refcount table is long enough, or grows too.
    for (next_size = 5_GiB; next_size <= 7_GiB; next_size += 1_GiB) {
      must(disk->resize(next_size));
      size = next_size;
    }
    CHECK(states > 50);
    must(disk->close());
    storage->set_observer({});
    CHECK(check_image(storage->image()).clean());
  }
}

TEST_CASE("qcow2: placing a long L1 table may fail at any call") {
  const MemImage image = [] {
    auto memory = std::make_shared<MemStorage>(make_qcow2({.size = 1_MiB, .cluster_size = 512, .refcount_bits = 64}));
    auto disk = must(open_qcow2(memory));
    for (const uint64_t size : {4_GiB + 512_MiB, 4_GiB + 768_MiB}) must(disk->resize(size));
    must(disk->close());
    return memory->image();
  }();
  for (const ErrorCode code : {ErrorCode::io, ErrorCode::no_space})
    for (uint64_t n = 1;; n += fault_step()) {
      CAPTURE(n);
      auto memory = std::make_shared<MemStorage>(image);
      auto faults = std::make_shared<FaultStorage>(memory);
      std::shared_ptr<Storage> storage = faults;
      if (code == ErrorCode::io) storage = std::make_shared<OrderStorage>(faults, image);
      auto disk = must(open_qcow2(storage));
      faults->fail_call(n, code);
      const bool done = disk->resize(5_GiB).has_value();
      const bool fired = faults->fired();
      faults->heal();
      const bool again = disk->resize(5_GiB + 256_MiB).has_value();
      CHECK(disk->close().has_value() == again);
      CHECK(check_image(memory->image()).corruptions == 0);
      if (!fired) {
        CHECK(done);
        break;
      }
    }
}

TEST_CASE("qcow2: a table past the end of the file is an error, whoever looked for it before") {
  const auto memory = std::make_shared<MemStorage>(make_qcow2({}));
  auto disk = must(open_qcow2(memory));
  must(disk->write(GuestOffset(0), pattern(4096)));
  must(disk->close());
  be<uint64_t> l1, entry(uint64_t{1} << 63 | uint64_t{1} << 45);
  must(memory->read(HostOffset(40), std::as_writable_bytes(std::span(&l1, 1))));
  must(memory->write(HostOffset(l1), std::as_bytes(std::span(&entry, 1))));

  disk = must(open_qcow2(memory, {.read_only = true}));
  CHECK_FALSE(disk->count_allocated(std::atomic<bool>(false)));
  std::vector<std::byte> bytes(512);
  CHECK_FALSE(disk->read(GuestOffset(0), bytes));
  must(disk->close());
}

TEST_CASE("qcow2: damage met by a request marks the image corrupt; reads go on, writes end") {
  MemImage image = full_image(false);
  // An L2 entry with a reserved bit: guest offset 0 is mapped by the first entry of the first table.
  be<uint64_t> l1_offset, table, entry;
  image.read(40, std::as_writable_bytes(std::span(&l1_offset, 1)));
  image.read(l1_offset, std::as_writable_bytes(std::span(&table, 1)));
  const uint64_t place = table & 0x00fffffffffffe00;
  image.read(place, std::as_writable_bytes(std::span(&entry, 1)));
  entry = entry | 0x100;
  image.write(place, std::as_bytes(std::span(&entry, 1)));

  auto memory = std::make_shared<MemStorage>(image);
  auto disk = must(open_qcow2(memory));
  std::vector<std::byte> bytes(512);
  CHECK(disk->read(GuestOffset(0), bytes).error().code() == ErrorCode::corrupt);
  const std::vector<std::byte> expected = front(4608);
  CHECK(read_all(*disk, GuestOffset(4096), 512) == std::vector(expected.end() - 512, expected.end()));
  CHECK(!disk->write(GuestOffset(4096), bytes));
  CHECK(!disk->flush());
  CHECK(!disk->close());
  be<uint64_t> incompatible;
  memory->image().read(72, std::as_writable_bytes(std::span(&incompatible, 1)));
  CHECK(incompatible == 2);

  auto again = must(open_qcow2(memory));
  CHECK(again->info().read_only);
  must(again->close());
}

}  // namespace imgfuse::test
