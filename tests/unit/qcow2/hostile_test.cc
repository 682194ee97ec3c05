// Images made to waste time or memory. The limits are generous: without the defence each would take hours or gigabytes.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "bytes.h"
#include "format/qcow2/reference_counts.h"
#include "format/qcow2/table_scan.h"
#include "qemu.h"
#include "support/builders.h"

using namespace imgfuse;
using namespace imgfuse::test;

namespace {

constexpr uint64_t kCluster = 65536;

/// Bytes that a check may read: every allocated byte a few times.
void check_cost(MemStorage& storage, uint64_t bytes_allowed) {
  storage.counts().reset();
  const auto result = qcow2::check(storage, Repair::none, {});
  if (!result) MESSAGE(result.error().text());
  CHECK(storage.counts().bytes_read < bytes_allowed);
}

/// A table of `count` equal entries at `offset`.
void fill_table(MemImage& image, uint64_t offset, uint64_t count, uint64_t entry) {
  std::vector<be<uint64_t>> entries(count, entry);
  image.write(offset, std::as_bytes(std::span(entries)));
}

/// 4M L1 entries at 1 GiB, the most there can be; the disk that belongs to them.
MemImage with_largest_l1(uint64_t entry) {
  MemImage image = make_qcow2({.size = 1_MiB});
  poke<uint32_t>(image, 36, 4 << 20);
  poke<uint64_t>(image, 40, 1_GiB);
  poke<uint64_t>(image, 24, uint64_t{2} << 50);
  fill_table(image, 1_GiB, 4 << 20, entry);
  return image;
}

}  // namespace

TEST_CASE("qcow2 hostile: 4M L1 entries for one L2 table take no longer than one") {
  MemImage image = with_largest_l1(0x40000 | kCopiedBit);
  fill_table(image, 0x40000, 8192, 0x50000 | kCopiedBit);
  image.write(0x50000, pattern(kCluster));
  MemStorage storage(image);

  check_cost(storage, 100_MiB);

  const CheckReport report = must(qcow2::check(storage, Repair::none, {}));
  CHECK(report.allocated_clusters == (uint64_t{4} << 20) * 8192);
  CHECK(report.corruptions > 0);
}

TEST_CASE("qcow2 hostile: L2 tables in holes of the file cost nothing") {
  MemImage image = with_largest_l1(0);
  std::vector<be<uint64_t>> entries(4 << 20);
  for (uint64_t i = 0; i < entries.size(); ++i) entries[i] = (2_GiB + i * kCluster) | kCopiedBit;
  image.write(1_GiB, std::as_bytes(std::span(entries)));
  image.resize(2_GiB + entries.size() * kCluster);
  MemStorage storage(image);

  check_cost(storage, 200_MiB);
}

TEST_CASE("qcow2 hostile: 65536 snapshots of the largest L1 table take no longer than one") {
  MemImage image = with_largest_l1(0x40000);
  fill_table(image, 0x40000, 8192, 0x50000);
  image.write(0x50000, pattern(kCluster));
  const uint64_t table = 2_GiB;
  struct Entry {
    be<uint64_t> l1;
    be<uint32_t> entries;
    char rest[44];
  };
  std::vector<Entry> snapshots(65536);
  for (size_t i = 0; i < snapshots.size(); ++i) {
    snapshots[i] = {1_GiB, 4 << 20, {}};
    snapshots[i].rest[27] = 16;  // extra data
  }
  image.write(table, std::as_bytes(std::span(snapshots)));
  poke<uint32_t>(image, 60, 65536);
  poke<uint64_t>(image, 64, table);
  MemStorage storage(image);

  check_cost(storage, 200_MiB);
}

TEST_CASE("qcow2 hostile: shifted snapshot L1 tables that overlap each other are read once") {
  MemImage image = with_largest_l1(0x40000);
  fill_table(image, 0x40000, 8192, 0x50000);
  const uint64_t table = 2_GiB;
  for (uint64_t i = 0; i < 1000; ++i) {
    poke<uint64_t>(image, table + i * 56, 1_GiB + i % 400 * kCluster);
    poke<uint32_t>(image, table + i * 56 + 8, static_cast<uint32_t>((4 << 20) - i * 17));
    poke<uint32_t>(image, table + i * 56 + 36, 16);
    poke<uint64_t>(image, table + i * 56 + 48, 1_MiB);
  }
  poke<uint32_t>(image, 60, 1000);
  poke<uint64_t>(image, 64, table);
  MemStorage storage(image);

  check_cost(storage, 200_MiB);
}

TEST_CASE("qcow2 hostile: tables that point at themselves and each other end") {
  MemImage image = with_largest_l1(1_GiB | kCopiedBit);
  for (uint64_t i = 0; i < 512; ++i) poke<uint64_t>(image, 1_GiB + i * kCluster, (1_GiB + i * kCluster) | kCopiedBit);
  MemStorage storage(image);

  check_cost(storage, 200_MiB);

  CHECK(must(qcow2::check(storage, Repair::none, {})).corruptions > 0);
}

TEST_CASE("qcow2 hostile: a refcount table of one block a million times over ends") {
  MemImage image = make_qcow2({.size = 1_MiB});
  poke<uint64_t>(image, 48, 1_GiB);
  poke<uint32_t>(image, 56, 128);
  fill_table(image, 1_GiB, 1 << 20, 0x20000);
  image.resize(4_TiB);
  MemStorage storage(image);

  check_cost(storage, 500_MiB);
}

TEST_CASE("qcow2 hostile: as many findings as entries are counted, but not all told") {
  MemImage image = with_largest_l1(0x7f00000000000000);
  MemStorage storage(image);
  uint64_t lines = 0;
  std::string last;

  const CheckReport report = must(qcow2::check(storage, Repair::none, [&](const std::string& finding) {
    ++lines;
    last = finding;
  }));

  CHECK(report.corruptions >= 4 << 20);
  CHECK(lines == 10001);
  CHECK(last == "more than 10000 findings; the rest is counted only");
}

TEST_CASE("qcow2 hostile: references all over a huge file are refused when they take too much memory") {
  // Each L2 entry lies in another page of counters. 32 L2 tables, 2^31 - 1 clusters of 512 bytes would be enough.
  MemImage image = make_qcow2({.size = 8_GiB, .cluster_size = 2 << 20});
  const uint64_t l1 = peek<uint64_t>(image, 40);
  const uint64_t first_table = 16_MiB;
  fill_table(image, l1, 1, first_table);
  Rng rng(1);
  std::vector<be<uint64_t>> entries(262144);
  for (auto& entry : entries) entry = rng.below(uint64_t{1} << 30) << 21;
  image.write(first_table, std::as_bytes(std::span(entries)));
  // Reached from a snapshot's L1 table of 4M equal entries, each reference counts for millions: wide counters.
  fill_table(image, 64_MiB, 4 << 20, first_table);
  poke<uint64_t>(image, 32_MiB, 64_MiB);
  poke<uint32_t>(image, 32_MiB + 8, 4 << 20);
  poke<uint32_t>(image, 60, 1);
  poke<uint64_t>(image, 64, 32_MiB);
  image.resize(uint64_t{1} << 51);
  MemStorage storage(image);

  const auto result = qcow2::check(storage, Repair::none, {});

  REQUIRE_FALSE(result);
  CHECK(result.error().text() == "counting the references of this image takes more than 160 MiB of memory");
}

TEST_CASE("qcow2 hostile: a file of more clusters than can be counted is refused") {
  MemImage image = make_qcow2({.size = 1_MiB});
  image.resize(uint64_t{1} << 48);
  MemStorage storage(image);

  const auto result = qcow2::check(storage, Repair::none, {});

  REQUIRE_FALSE(result);
  CHECK(result.error().text() == "the file has 4294967296 clusters, a check can count 2147483647");
}

TEST_CASE("qcow2 hostile: images of noise are refused or checked, and repaired or not, without harm") {
  for (uint64_t run = 0; run < from_environment("IMG_RUNS", 200); ++run) {
    CAPTURE(base_seed());
    CAPTURE(run);
    Rng rng(base_seed() + run);
    MemImage image =
        make_qcow2({.size = 4_MiB, .cluster_size = 512u << rng.below(4), .refcount_bits = 1u << rng.below(7)});
    image.write(image.size(), pattern(rng.below(60000), run));
    // Pointers that are aligned and inside the file find more than noise does.
    const uint64_t cluster = uint64_t{1} << peek<uint32_t>(image, 20);
    for (uint64_t i = rng.below(300); i > 0; --i) {
      const uint64_t flags = rng.one_in(8) ? kCompressedBit : rng.one_in(2) ? kCopiedBit : 0;
      const uint64_t target = rng.below(image.size() / cluster + 2) * cluster;
      poke(image, rng.between(cluster / 8, image.size() / 8) * 8, target | flags);
    }
    if (rng.one_in(2)) poke(image, 24 + rng.below(11) * 8, rng.below(256));
    if (rng.one_in(3)) {
      poke<uint32_t>(image, 60, static_cast<uint32_t>(rng.below(4)));
      poke<uint64_t>(image, 64, rng.below(image.size() / cluster) * cluster);
    }
    for (const Repair mode : {Repair::none, Repair::leaks, Repair::all}) {
      MemStorage storage(image);
      const auto result = qcow2::check(storage, mode, {});
      if (!result || mode != Repair::all) continue;
      MemStorage again(storage.image());
      const CheckReport after = must(qcow2::check(again, Repair::none, {}));
      CHECK(after.corruptions == result->corruptions);
      CHECK(after.leaks == result->leaks);
    }
  }
}

TEST_CASE("qcow2: reference counters are exact up to 2^32 - 1, where they stay") {
  qcow2::MemoryBudget budget(10_MiB);
  qcow2::ReferenceCounts counts(budget);
  for (const uint64_t times :
       {uint64_t{1}, uint64_t{2}, uint64_t{15}, uint64_t{255}, uint64_t{70000}, uint64_t{1} << 31}) {
    counts.add(100, times);
    counts.add(1000000, 1);
  }
  CHECK(counts.get(100) == 1 + 2 + 15 + 255 + 70000 + (uint64_t{1} << 31));
  CHECK(counts.get(1000000) == 6);
  CHECK(counts.get(99) == 0);
  CHECK(counts.get(uint64_t{1} << 40) == 0);
  CHECK(counts.next(0) == 100);
  CHECK(counts.next(101) == 1000000);
  CHECK_FALSE(counts.next(1000001));
  CHECK(counts.end() == 1000001);
  counts.add(100, ~uint64_t{0});
  counts.add(100, ~uint64_t{0});
  CHECK(counts.get(100) == 0xffffffff);
  counts.clear();
  CHECK_FALSE(counts.next(0));
  CHECK(budget.take(10_MiB));
}

TEST_CASE("qcow2: overlapping tables are taken apart into stretches that know how often they are covered") {
  const auto range = [](uint64_t begin, uint64_t length) { return HostRange{HostOffset(begin), length}; };
  const auto stretches = qcow2::overlay({range(0, 100), range(50, 100), range(50, 10), range(300, 0), range(200, 8)});

  REQUIRE(stretches.size() == 5);
  const qcow2::Stretch expected[] = {
      {range(0, 50), 1}, {range(50, 10), 3}, {range(60, 40), 2}, {range(100, 50), 1}, {range(200, 8), 1}};
  for (size_t i = 0; i < 5; ++i) {
    CHECK(stretches[i].range == expected[i].range);
    CHECK(stretches[i].times == expected[i].times);
  }
}
