// Reads of compressed clusters: what is kept of them, and that it never outlives what it was read from.
#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <thread>

#include "imgfuse/snapshots.h"
#include "support/builders.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kCluster = 4096;
constexpr uint64_t kSize = 1_MiB;

WatchedDisk open_compressing(uint64_t cache = 256_KiB) {
  return open_watched(make_qcow2({.size = kSize, .cluster_size = kCluster}),
                      {.compress = "zlib", .compressed_cache = cache});
}

std::vector<std::byte> part(const std::vector<std::byte>& bytes, size_t offset, size_t length) {
  return {bytes.begin() + static_cast<ptrdiff_t>(offset), bytes.begin() + static_cast<ptrdiff_t>(offset + length)};
}

TEST_CASE("qcow2: pieces of a compressed cluster are read from the host once") {
  for (const uint64_t cache : {256_KiB, 0_KiB}) {
    CAPTURE(cache);
    const WatchedDisk disk = open_compressing(cache);
    const auto data = loose_pattern(4 * kCluster, 1);
    must(disk->write(GuestOffset(0), data));
    disk.memory->counts().reset();

    for (uint64_t at = 0; at < 4 * kCluster; at += 512)
      CHECK(read_all(*disk.disk, GuestOffset(at), 512) == part(data, at, 512));

    CHECK(disk.memory->counts().reads == (cache ? 4 : 32));
    must(disk->close());
  }
}

TEST_CASE("qcow2: a stream that takes the place of another one is not mistaken for it") {
  const WatchedDisk disk = open_compressing();
  for (uint64_t round = 0; round < 4; ++round) {
    CAPTURE(round);
    const auto data = loose_pattern(8 * kCluster, round);  // all rounds have streams of the same lengths in sectors
    const GuestOffset at((round % 2) * 64 * kCluster);
    must(disk->write(at, data));
    for (uint64_t i = 0; i < 8 * kCluster; i += 1024) CHECK(read_all(*disk.disk, at + i, 1024) == part(data, i, 1024));
    CHECK(read_all(*disk.disk, at, 8 * kCluster) == data);
    must(disk->discard({at, 8 * kCluster}));
    must(disk->flush());  // the host clusters are free
  }
  must(disk->close());
}

TEST_CASE("qcow2: nor one that was freed with a snapshot") {
  const WatchedDisk disk = open_compressing();
  for (uint64_t round = 0; round < 4; ++round) {
    CAPTURE(round);
    const auto data = loose_pattern(8 * kCluster, round);
    must(disk->write(GuestOffset(0), data));
    CHECK(read_all(*disk.disk, GuestOffset(512), 1024) == part(data, 512, 1024));
    must(disk->snapshots()->create("s"));
    CHECK(read_all(*must(disk->snapshots()->open("s")), GuestOffset(512), 1024) == part(data, 512, 1024));
    must(disk->discard({GuestOffset(0), 8 * kCluster}));
    must(disk->snapshots()->remove("s"));
    must(disk->flush());
  }
  must(disk->close());
}

TEST_CASE("qcow2: readers that race overwriting, discarding and reuse see nothing that is older") {
  constexpr uint64_t kClusters = 24;
  constexpr uint64_t kRounds = 400;
  const WatchedDisk disk = open_compressing(8 * kCluster);
  struct Rounds {
    std::atomic<uint64_t> begun = 0, done = 0;
  };
  std::array<Rounds, kClusters> rounds;
  for (uint64_t c = 0; c < kClusters; ++c) must(disk->write(GuestOffset(c * kCluster), loose_pattern(kCluster, c)));

  std::atomic<bool> stop = false;
  std::atomic<uint64_t> wrong = 0;
  std::vector<std::thread> readers;
  for (uint64_t i = 0; i < 2; ++i)
    readers.emplace_back([&, i] {
      Rng rng(base_seed() + i);
      while (!stop) {
        const uint64_t c = rng.below(kClusters);
        const uint64_t at = rng.below(7) * 512;
        const uint64_t oldest = rounds[c].done;
        const auto read = read_all(*disk.disk, GuestOffset(c * kCluster + at), 512);
        bool known = false;
        for (uint64_t r = oldest; r <= rounds[c].begun; ++r)
          known |= read == part(loose_pattern(kCluster, c + r * 1000), at, 512);
        wrong += !known;
      }
    });
  Rng rng(base_seed());
  for (uint64_t r = 1; r <= kRounds; ++r) {
    const uint64_t c = rng.below(kClusters);
    const uint64_t next = rounds[c].begun + 1;
    rounds[c].begun = next;
    must(disk->write(GuestOffset(c * kCluster), loose_pattern(kCluster, c + next * 1000)));
    rounds[c].done = next;
    if (r % 4 == 0) must(disk->flush());
  }
  stop = true;
  for (std::thread& reader : readers) reader.join();

  CHECK(wrong == 0);
  must(disk->close());
}

}  // namespace
}  // namespace imgfuse::test
