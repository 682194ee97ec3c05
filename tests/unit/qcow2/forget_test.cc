// Forgetting: an overlay gives up what it holds, and what lies below it shows.
#include <doctest/doctest.h>

#include "base/log.h"
#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/fault_storage.h"
#include "support/order_storage.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kCluster = 4096;
constexpr uint64_t kSize = 4_MiB + 512;  // ends inside a cluster
constexpr GuestRange kAll{GuestOffset(0), kSize};

struct Overlay {
  MemImage image;
  MemImage backing;
};

/// Data, zeros with and without host clusters, nothing; and a backing file with other content.
Overlay make_overlay(uint32_t version = 3) {
  Overlay overlay;
  overlay.backing.write(0, pattern(2_MiB, 9));
  const WatchedDisk disk =
      open_watched(make_qcow2({.size = kSize, .cluster_size = kCluster, .version = version, .backing = "base"}),
                   {.backing = overlay.backing});
  must(disk->write(GuestOffset(0), pattern(300 * kCluster, 1)));
  must(disk->write_zeroes({GuestOffset(100 * kCluster), 50 * kCluster}, Zeroing::keep_allocation));
  must(disk->write_zeroes({GuestOffset(200 * kCluster), 50 * kCluster}, Zeroing::may_free));
  must(disk->write(GuestOffset(4_MiB - 100), pattern(612, 2)));
  must(disk->close());
  overlay.image = disk.memory->image();
  return overlay;
}

std::vector<std::byte> content(const MemImage& image, const MemImage& backing) {
  auto disk = must(open_qcow2(std::make_shared<MemStorage>(image), {.read_only = true, .backing = backing}));
  auto bytes = read_all(*disk, GuestOffset(0), kSize);
  must(disk->close());
  return bytes;
}

std::vector<std::byte> bytes_of(const MemImage& image) {
  std::vector<std::byte> bytes(kSize);
  image.read(0, bytes);
  return bytes;
}

/// After a commit the backing file holds what the overlay does, so that nothing may change at all while it forgets.
Overlay make_committed() {
  Overlay overlay = make_overlay();
  const auto bytes = content(overlay.image, overlay.backing);
  overlay.backing.write(0, bytes);
  return overlay;
}

}  // namespace

TEST_CASE("qcow2: an overlay that forgets everything reads as its backing file and holds no cluster") {
  for (const uint32_t version : {2u, 3u}) {
    CAPTURE(version);
    const Overlay overlay = make_overlay(version);
    const WatchedDisk disk = open_watched(overlay.image, {.backing = overlay.backing});

    must(disk->forget(kAll));

    CHECK(read_all(*disk.disk, GuestOffset(0), kSize) == bytes_of(overlay.backing));
    must(disk->close());
    CHECK(content(disk.memory->image(), overlay.backing) == bytes_of(overlay.backing));
    const CheckReport report = check_image(disk.memory->image());
    CHECK(report.clean());
    CHECK(report.allocated_clusters == 0);
  }
}

TEST_CASE("qcow2: forgetting a part leaves the clusters that are only touched") {
  const Overlay overlay = make_overlay();
  auto expected = content(overlay.image, overlay.backing);
  overlay.backing.read(3 * kCluster, Bytes(expected).subspan(3 * kCluster, 5 * kCluster));
  const WatchedDisk disk = open_watched(overlay.image, {.backing = overlay.backing});

  must(disk->forget({GuestOffset(2 * kCluster + 1), 6 * kCluster}));

  CHECK(read_all(*disk.disk, GuestOffset(0), kSize) == expected);
  must(disk->close());
}

TEST_CASE("qcow2: what a snapshot shares stays its own when the disk forgets it") {
  const Overlay overlay = make_overlay();
  const auto with = with_snapshot(overlay.image);
  if (!with) return;
  const WatchedDisk disk = open_watched(*with, {.backing = overlay.backing});

  must(disk->forget(kAll));

  CHECK(read_all(*disk.disk, GuestOffset(0), kSize) == bytes_of(overlay.backing));
  must(disk->close());
  CHECK(check_image(disk.memory->image()).clean());
}

TEST_CASE("qcow2: forgetting is refused on a read-only disk and on a disk without layers") {
  const Overlay overlay = make_overlay();
  auto disk =
      must(open_qcow2(std::make_shared<MemStorage>(overlay.image), {.read_only = true, .backing = overlay.backing}));
  CHECK(disk->forget(kAll).error().code() == ErrorCode::read_only);
  must(disk->close());
}

TEST_CASE("qcow2: a committed overlay reads the same after a crash at any moment of its forgetting") {
  const Overlay overlay = make_committed();
  const auto expected = bytes_of(overlay.backing);
  auto storage = std::make_shared<CrashStorage>(overlay.image);
  Rng rng(base_seed());
  std::vector<MemImage> crashed;
  storage->set_observer([&] {
    for (const CrashMode mode : kCrashModes) crashed.push_back(storage->crash(mode, rng));
  });
  auto disk = must(open_qcow2(std::make_shared<OrderStorage>(storage, overlay.image), {.backing = overlay.backing}));

  must(disk->forget(kAll));
  must(disk->close());

  REQUIRE(crashed.size() > 20);
  for (const MemImage& image : crashed) {
    const CheckReport report = check_image(image);
    REQUIRE(report.corruptions + report.check_errors == 0);
    REQUIRE(content(image, overlay.backing) == expected);
  }
}

TEST_CASE("qcow2: a committed overlay reads the same when any call fails while it forgets") {
  set_log_sink([](LogLevel, const std::string&) {});
  const Overlay overlay = make_committed();
  const auto expected = bytes_of(overlay.backing);
  for (uint64_t n = 1;; n += fault_step()) {
    CAPTURE(n);
    auto memory = std::make_shared<MemStorage>(overlay.image);
    auto storage = std::make_shared<FaultStorage>(memory);
    auto disk = must(open_qcow2(storage, {.backing = overlay.backing}));

    storage->fail_call(n, ErrorCode::io);
    (void)disk->forget(kAll);
    (void)disk->close();

    REQUIRE(check_image(memory->image()).corruptions == 0);
    REQUIRE(content(memory->image(), overlay.backing) == expected);
    if (!storage->fired()) break;
  }
}

}  // namespace imgfuse::test
