// Images that lie: each gives a clear error or correct data, and nothing is changed.
#include <doctest/doctest.h>

#include <functional>

#include "format/qed/header.h"
#include "qed_bytes.h"
#include "support/cold_storage.h"
#include "support/noted_fetches.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kCluster = QedSample::kCluster;

struct Hostile {
  std::string name;
  std::function<void(QedSample&)> damage;
  std::string error;  ///< part of what opening says; empty: it opens, and reads of some clusters fail
};

template <class T>
std::function<void(QedSample&)> set(uint64_t at, T value) {
  return [=](QedSample& s) { poke_le<T>(s.image, at, value); };
}
std::function<void(QedSample&)> entry(uint64_t index, uint64_t value) {
  return [=](QedSample& s) { s.set_l2(index, value); };
}
std::function<void(QedSample&)> l1(uint64_t value) { return set<uint64_t>(QedSample::kL1, value); }
std::function<void(QedSample&)> name(uint32_t offset, uint32_t length) {
  return [=](QedSample& s) {
    poke_le<uint64_t>(s.image, kFeaturesAt, 1);
    poke_le(s.image, kNameOffsetAt, offset);
    poke_le(s.image, kNameLengthAt, length);
  };
}

const std::vector<Hostile> kHostile = {
    {"cluster size 0", set<uint32_t>(kClusterSizeAt, 0), "cluster size 0 is not"},
    {"cluster size 1", set<uint32_t>(kClusterSizeAt, 1), "cluster size 1 is not"},
    {"cluster size 2 KiB", set<uint32_t>(kClusterSizeAt, 2048), "cluster size 2048 is not"},
    {"cluster size 3 * 4 KiB", set<uint32_t>(kClusterSizeAt, 12288), "cluster size 12288 is not"},
    {"cluster size 128 MiB", set<uint32_t>(kClusterSizeAt, 128 << 20), "cluster size 134217728 is not"},
    {"cluster size 2^31", set<uint32_t>(kClusterSizeAt, 1u << 31), "cluster size 2147483648 is not"},
    {"cluster size larger than the file", set<uint32_t>(kClusterSizeAt, 64 << 20), "L1 table"},
    {"table size 0", set<uint32_t>(kTableSizeAt, 0), "table size 0 is not"},
    {"table size 3", set<uint32_t>(kTableSizeAt, 3), "table size 3 is not"},
    {"table size 32", set<uint32_t>(kTableSizeAt, 32), "table size 32 is not"},
    {"table size 2^31", set<uint32_t>(kTableSizeAt, 1u << 31), "table size 2147483648 is not"},
    {"a table past the end", set<uint32_t>(kTableSizeAt, 16), "L1 table"},
    {"a header of 2^32 clusters", set<uint32_t>(kHeaderSizeAt, ~0u), "header of 4294967295 clusters"},
    {"a header of 65536 clusters", set<uint32_t>(kHeaderSizeAt, 65536), "header of 65536 clusters"},
    {"a header over the L1 table", set<uint32_t>(kHeaderSizeAt, 2), "L1 table"},
    {"a header as long as the file", set<uint32_t>(kHeaderSizeAt, 8), "L1 table"},
    {"feature 8", set<uint64_t>(kFeaturesAt, 8), "bits 0x8"},
    {"feature 2^63", set<uint64_t>(kFeaturesAt, uint64_t{1} << 63), "bits 0x8000000000000000"},
    {"all features", set<uint64_t>(kFeaturesAt, ~uint64_t{0}), "does not know"},
    {"L1 at 0", set<uint64_t>(kL1At, 0), "L1 table"},
    {"L1 in the header, header size 0",
     [](QedSample& s) {
       poke_le<uint32_t>(s.image, kHeaderSizeAt, 0);
       poke_le<uint64_t>(s.image, kL1At, 0);
     },
     "L1 table"},
    {"L1 unaligned", set<uint64_t>(kL1At, 0x10200), "L1 table"},
    {"L1 past the end", set<uint64_t>(kL1At, 0x100000), "L1 table"},
    {"L1 half past the end", set<uint64_t>(kL1At, 0x70000), "L1 table"},
    {"L1 at the end of the address space", set<uint64_t>(kL1At, uint64_t(-65536)), "L1 table"},
    {"size 1", set<uint64_t>(kSizeAt, 1), "not a multiple of 512"},
    {"size 2^64 - 512", set<uint64_t>(kSizeAt, uint64_t(-512)), "the largest of cluster size"},
    {"size past the largest", set<uint64_t>(kSizeAt, (uint64_t{1} << 44) + 512), "the largest of cluster size"},
    {"name past the header", name(65536 - 3, 4), "outside the header"},
    {"name at 2^32 - 1", name(~0u, ~0u), "outside the header"},
    {"name of 0 bytes", name(64, 0), "is empty"},
    {"name of 4096 bytes", name(64, 4096), "longer than 4095"},
    {"name with NUL", name(64, 4), "NUL byte"},
    {"cut off in the header", [](QedSample& s) { s.image.resize(63); }, ""},
    {"cut off in the L1 table", [](QedSample& s) { s.image.resize(0x2ffff); }, "L1 table"},
    {"L1 entry 1", l1(1), ""},
    {"L1 entry 2", l1(2), ""},
    {"L1 entry unaligned", l1(0x30008), ""},
    {"L1 entry at the L1 table", l1(0x10000), ""},
    {"L1 entry with its end past the file", l1(0x70000), ""},
    {"L1 entry 2^64 - 64 KiB", l1(uint64_t(-65536)), ""},
    {"L1 entry at 2^63", l1(uint64_t{1} << 63), ""},
    {"L2 entry 2", entry(0, 2), ""},
    {"L2 entry 4095", entry(0, 4095), ""},
    {"L2 entry unaligned", entry(0, 0x50200), ""},
    {"L2 entry at F", entry(0, QedSample::kEnd), ""},
    {"L2 entry 2^64 - 1", entry(0, ~uint64_t{0}), ""},
    {"L2 entry 2^64 - 64 KiB", entry(0, uint64_t(-65536)), ""},
    {"L2 entry at the L1 table", entry(0, QedSample::kL1), ""},
    {"L2 entry at its own table", entry(0, QedSample::kL2 + kCluster), ""},
    {"L2 entry in a torn last cluster",
     [](QedSample& s) {
       s.image.resize(QedSample::kEnd - 1);
       s.set_l2(1, QedSample::kData + 2 * kCluster);
     },
     ""},
};

/// Every sector that can be read is what it was; errors are clear.
void check_reads(Disk& disk, const MemImage& content, bool expect_failures) {
  bool failed = false;
  for (uint64_t guest = 0; guest < 1_MiB; guest += kCluster) {
    std::vector<std::byte> found(kCluster), expected(kCluster);
    content.read(guest, expected);
    if (const Result<> read = disk.read(GuestOffset(guest), found); !read) {
      CHECK(read.error().code() == ErrorCode::corrupt);
      CHECK(read.error().text().find(" entry ") != std::string::npos);
      failed = true;
    } else {
      CHECK(found == expected);
    }
  }
  CHECK(failed == expect_failures);
}

TEST_CASE("qed: hostile images give a clear error or correct data, and stay as they are") {
  CHECK(kHostile.size() >= 40);
  for (const Hostile& hostile : kHostile) {
    CAPTURE(hostile.name);
    QedSample s;
    const MemImage content = s.content();
    hostile.damage(s);
    const auto storage = std::make_shared<MemStorage>(s.image);
    storage->counts().reset();

    auto disk = qed::open(storage, {.read_only = true, .open_backing = {}});
    if (!disk) {
      CHECK((!hostile.error.empty() || s.image.size() == 63));
      CHECK(disk.error().text().find(hostile.error) != std::string::npos);
    } else {
      CHECK(hostile.error.empty());
      check_reads(**disk, content, true);
      must((*disk)->close());
    }
    auto writable = qed::open(storage, {.open_backing = {}});
    if (writable) {
      const bool both = (*writable)->write(GuestOffset(0), pattern(512)) &&
                        (*writable)->write(GuestOffset(kCluster * 3), pattern(512));
      CHECK_FALSE(both);
      (void)(*writable)->close();
    }
    (void)qed::check(*storage, Repair::none, {});
    if (!writable) CHECK(storage->counts().writes == 0);
  }
}

TEST_CASE("qed: an image whose tables overlap is only read") {
  QedSample s;
  poke_le<uint64_t>(s.image, kSizeAt, 4_GiB);
  s.image.resize(QedSample::kEnd);
  poke_le<uint64_t>(s.image, QedSample::kL1 + 8, QedSample::kL2 + kCluster);
  const auto storage = std::make_shared<MemStorage>(s.image);
  must(must(open_image(storage, {.read_only = true}))->close());

  const auto writable = open_image(storage);

  REQUIRE(!writable);
  CHECK(writable.error().text() == "the table at 0x40000 overlaps another one; the image can only be read");
}

TEST_CASE("qed: after damage is met nothing more is written, and reads go on") {
  QedSample s;
  s.set_l2(1, 0x1234);
  auto disk = must(open_image(std::make_shared<MemStorage>(s.image)));
  must(disk->write(GuestOffset(0), pattern(512, 1)));

  CHECK_FALSE(disk->write(GuestOffset(kCluster), pattern(512)));

  CHECK_FALSE(disk->write(GuestOffset(0), pattern(512, 2)));
  CHECK_FALSE(disk->flush());
  CHECK(read_all(*disk, GuestOffset(0), 512) == pattern(512, 1));
  CHECK_FALSE(disk->close());
}

TEST_CASE("qed: a read that does not want to wait does not end writing, whatever it has seen of damage") {
  QedSample s;
  s.set_l2(0, QedSample::kData + 2 * kCluster);  // the last one
  s.set_l2(1, QedSample::kData + 3 * kCluster);
  s.set_l2(3, 0);
  auto storage = std::make_shared<ColdStorage>(std::make_shared<MemStorage>(s.image));
  auto disk = must(open_image(storage));
  must(disk->write(GuestOffset(0), pattern(512, 1)));
  CHECK(would_wait(read_in_a_hurry(*disk, {GuestOffset(0), 2 * kCluster})));
  must(disk->write(GuestOffset(0), pattern(512, 2)));
  must(disk->flush());
  CHECK(read_all(*disk, GuestOffset(0), 512) == pattern(512, 2));
  must(disk->close());
}

TEST_CASE("qed: a hostile header does not make opening or checking take memory or time") {
  MemStorage storage(make_qed({.size = qed::max_image_size(1 << 20, 16), .cluster_size = 1 << 20, .table_size = 16}));
  must(storage.resize(uint64_t{1} << 62));  // sparse
  auto shared = std::make_shared<MemStorage>(storage.image());

  auto disk = must(open_image(shared));  // an L1 table of 16 MiB, of holes
  must(disk->close());
  const CheckReport report = must(qed::check(*shared, Repair::none, {}));

  CHECK(report.corruptions == 0);
  CHECK(report.leaks == (uint64_t{1} << 42) - 17);
}

}  // namespace
}  // namespace imgfuse::test
