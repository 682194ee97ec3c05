// Zeros that the guest writes, on disks that look for them.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>

#include "support/builders.h"
#include "support/model_disk.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kCluster = 65536;

WatchedDisk open_detecting(DetectZeroes mode, const Qcow2Spec& spec = {}) {
  WatchedDisk disk = open_watched(make_qcow2(spec));
  disk->set_detect_zeroes(mode);
  return disk;
}

std::vector<std::byte> zeros(size_t length) { return std::vector<std::byte>(length); }

uint64_t allocated(Disk& disk) {
  const std::atomic<bool> stop = false;
  must(disk.count_allocated(stop));
  return disk.allocated();
}

}  // namespace

TEST_CASE("detect zeroes: zeros take no space where there was nothing, and do where nobody looks for them") {
  for (const DetectZeroes mode : {DetectZeroes::off, DetectZeroes::on, DetectZeroes::unmap}) {
    const WatchedDisk disk = open_detecting(mode);

    must(disk->write(GuestOffset(0), zeros(4 * kCluster)));
    must(disk->write(GuestOffset(1_MiB + 512), zeros(1024)));  // a part of a cluster
    must(disk->write(GuestOffset(2_MiB - 512), zeros(kCluster)));

    CHECK(allocated(*disk.disk) == (mode == DetectZeroes::off ? 7 * kCluster : 0));
    CHECK(read_all(*disk.disk, GuestOffset(0), 3_MiB) == zeros(3_MiB));
    must(disk->close());
    CHECK(check_image(disk.memory->image()).clean());
  }
}

TEST_CASE("detect zeroes: zeros over data keep its space, or free it") {
  for (const DetectZeroes mode : {DetectZeroes::on, DetectZeroes::unmap}) {
    const WatchedDisk disk = open_detecting(mode);
    must(disk->write(GuestOffset(0), pattern(4 * kCluster)));
    disk.memory->counts().reset();

    must(disk->write(GuestOffset(kCluster), zeros(2 * kCluster)));

    CHECK(disk.memory->counts().bytes_written < kCluster);
    CHECK(allocated(*disk.disk) == (mode == DetectZeroes::on ? 4 : 2) * kCluster);
    CHECK(read_all(*disk.disk, GuestOffset(kCluster), 2 * kCluster) == zeros(2 * kCluster));
    CHECK(read_all(*disk.disk, GuestOffset(0), kCluster) == pattern(kCluster));
    must(disk->close());
  }
}

TEST_CASE("detect zeroes: of a write the clusters that are zeros take no space") {
  for (const bool subclusters : {false, true}) {
    const uint64_t unit = subclusters ? kCluster / 32 : kCluster;
    const uint64_t looked_for = std::max<uint64_t>(unit, 4096);
    const WatchedDisk disk = open_detecting(DetectZeroes::unmap, {.extended_l2 = subclusters});
    std::vector<std::byte> data = pattern(8 * kCluster, 3);
    std::fill_n(data.begin() + 1 * kCluster, 3 * kCluster, std::byte{0});
    std::fill_n(data.begin() + 6 * kCluster + 5, looked_for, std::byte{0});  // no whole unit

    must(disk->write(GuestOffset(0), data));

    CHECK(allocated(*disk.disk) == 5 * kCluster);
    CHECK(read_all(*disk.disk, GuestOffset(0), data.size()) == data);
    must(disk->close());
  }
}

TEST_CASE("detect zeroes: a byte that is not zero is never lost, wherever it is") {
  const WatchedDisk disk = open_detecting(DetectZeroes::unmap, {.cluster_size = 4096});
  for (const size_t length : {1u, 511u, 4096u, 4097u, 12288u})
    for (const size_t place : {size_t{0}, length / 2, length - 1}) {
      CAPTURE(length);
      CAPTURE(place);
      std::vector<std::byte> data(length);
      data[place] = std::byte{1};
      must(disk->write(GuestOffset(3), data));
      CHECK(read_all(*disk.disk, GuestOffset(3), length) == data);
    }
  must(disk->close());
}

TEST_CASE("detect zeroes: a disk that is open read-only refuses zeros as it does other bytes") {
  const auto disk = must(open_qcow2(std::make_shared<MemStorage>(make_qcow2({}), false), {.read_only = true}));
  disk->set_detect_zeroes(DetectZeroes::on);

  const auto result = disk->write(GuestOffset(0), zeros(kCluster));

  REQUIRE_FALSE(result);
  CHECK(result.error().code() == ErrorCode::read_only);
}

TEST_CASE("detect zeroes: what is written through is durable") {
  const WatchedDisk disk = open_detecting(DetectZeroes::on);
  disk->set_write_through();
  must(disk->write(GuestOffset(0), pattern(kCluster)));
  disk.memory->counts().reset();

  must(disk->write(GuestOffset(0), zeros(kCluster)));

  CHECK(disk.memory->counts().flushes > 0);
  must(disk->close());
}

TEST_CASE_TEMPLATE("detect zeroes: random requests read back, whatever is zeros in them", Kind, IMG_EVERY_KIND) {
  Rng rng(base_seed());
  for (const DetectZeroes mode : {DetectZeroes::on, DetectZeroes::unmap}) {
    for (const uint32_t cluster_size : {4096u, 65536u}) {
      constexpr uint64_t kSize = 4_MiB + 1536;
      const MemImage image = Kind::image({.size = kSize, .cluster_size = cluster_size});
      const WatchedDisk disk = open_watched(image);
      disk->set_detect_zeroes(mode);
      ModelDisk model(kSize, windows_for(kSize, cluster_size, 6), {});
      const Workload workload{.cluster_size = cluster_size, .zeros = true};

      std::string what;
      for (int i = 0; i < 200; ++i) must(random_request(*disk.disk, model, workload, rng, what));

      CHECK(model.compare_exactly(*disk.disk) == "");
      must(disk->close());
    }
  }
}

}  // namespace imgfuse::test
