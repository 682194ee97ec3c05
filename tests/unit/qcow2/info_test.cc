#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "bytes.h"
#include "format/qcow2/snapshot_table.h"
#include "support/builders.h"

using namespace imgfuse;
using namespace imgfuse::test;

namespace {

Result<ImageInfo> info(const MemImage& image) {
  MemStorage storage(image);
  return qcow2::info(storage);
}

struct SnapshotSpec {
  uint32_t extra_size = 24;
  std::string id = "1";
  std::string name = "first";
};

constexpr uint64_t kTable = 0x100000;

/// Puts a snapshot table at kTable, without counting anything.
MemImage with_table(MemImage image, const std::vector<SnapshotSpec>& snapshots) {
  uint64_t at = kTable;
  for (const SnapshotSpec& s : snapshots) {
    poke<uint64_t>(image, at, 0x30000);
    poke<uint32_t>(image, at + 8, 1);
    poke<uint16_t>(image, at + 12, static_cast<uint16_t>(s.id.size()));
    poke<uint16_t>(image, at + 14, static_cast<uint16_t>(s.name.size()));
    poke<uint32_t>(image, at + 16, 1700000000);
    poke<uint32_t>(image, at + 20, 5);
    poke<uint64_t>(image, at + 24, 77);
    poke<uint32_t>(image, at + 32, 111);
    poke<uint32_t>(image, at + 36, s.extra_size);
    if (s.extra_size >= 8) poke<uint64_t>(image, at + 40, 5_GiB);
    if (s.extra_size >= 16) poke<uint64_t>(image, at + 48, 32_MiB);
    if (s.extra_size >= 24) poke<uint64_t>(image, at + 56, 99);
    poke_text(image, at + 40 + s.extra_size, s.id + s.name);
    at += (40 + s.extra_size + s.id.size() + s.name.size() + 7) / 8 * 8;
  }
  image.resize(std::max(image.size(), at));
  poke<uint32_t>(image, 60, static_cast<uint32_t>(snapshots.size()));
  poke<uint64_t>(image, 64, kTable);
  return image;
}

}  // namespace

TEST_CASE("qcow2 info: says what the header says") {
  CreateOptions options;
  options.size = 10_MiB;
  options.cluster_size = 8192;
  options.refcount_bits = 8;
  options.lazy_refcounts = true;
  options.compression_type = "zstd";
  options.backing_file = "base.img";
  options.backing_format = "raw";
  MemStorage storage;
  must(qcow2::create(storage, options));

  const ImageInfo image = must(info(storage.image()));

  CHECK(image.format == "qcow2");
  CHECK(image.virtual_size == 10_MiB);
  CHECK(image.cluster_size == 8192);
  CHECK_FALSE(image.dirty);
  CHECK_FALSE(image.encrypted);
  CHECK(image.backing_filename == "base.img");
  CHECK(image.backing_format == "raw");
  CHECK(image.snapshots.empty());
  REQUIRE(image.qcow2);
  CHECK(image.qcow2->compat == "1.1");
  CHECK(image.qcow2->compression_type == "zstd");
  CHECK(image.qcow2->refcount_bits == 8);
  CHECK(image.qcow2->lazy_refcounts);
  CHECK_FALSE(image.qcow2->corrupt);
}

TEST_CASE("qcow2 info: dirty, corrupt, encrypted and extended images are described, not refused") {
  MemImage image = make_qcow2({.size = 1_MiB});
  poke<uint64_t>(image, 72, 1 | 2 | 4 | 16);
  poke<uint32_t>(image, 32, 1);

  const ImageInfo found = must(info(image));

  CHECK(found.dirty);
  CHECK(found.encrypted);
  CHECK(found.qcow2->corrupt);
  CHECK(found.qcow2->extended_l2);
}

TEST_CASE("qcow2 info: snapshots with short, full and unknown extra data are listed") {
  const MemImage image =
      with_table(make_qcow2({.size = 64_MiB}),
                 {{0, "1", "none"}, {8, "2", "state"}, {16, "3", "size"}, {24, "4", "count"}, {1024, "55", "future"}});

  const std::vector<SnapshotInfo> found = must(info(image)).snapshots;

  REQUIRE(found.size() == 5);
  CHECK(found[0].vm_state_size == 111);
  CHECK(found[0].disk_size == 64_MiB);
  CHECK(found[1].vm_state_size == 5_GiB);
  CHECK(found[1].disk_size == 64_MiB);
  CHECK(found[2].disk_size == 32_MiB);
  CHECK_FALSE(found[2].icount);
  CHECK(found[3].icount == 99);
  CHECK(found[3].date_sec == 1700000000);
  CHECK(found[3].date_nsec == 5);
  CHECK(found[3].vm_clock_nsec == 77);
  CHECK(found[4].id == "55");
  CHECK(found[4].name == "future");
}

TEST_CASE("qcow2 info: a snapshot table past a limit is refused") {
  const MemImage empty = make_qcow2({.size = 1_MiB});
  SUBCASE("extra data") {
    const auto result = info(with_table(empty, {{24, "1", "a"}, {1025, "2", "b"}}));
    REQUIRE_FALSE(result);
    CHECK(result.error().text() == "snapshot 1 has 1025 bytes of extra data, more than 1024");
  }
  SUBCASE("length") {
    std::vector<SnapshotSpec> many(1100, {0, "1", std::string(65535, 'x')});
    const auto result = info(with_table(empty, many));
    REQUIRE_FALSE(result);
    CHECK(result.error().text() == "the snapshot table is longer than 64 MiB at snapshot 1023 of 1100");
  }
  SUBCASE("place") {
    MemImage image = with_table(empty, {{}});
    poke<uint64_t>(image, 64, 0);
    CHECK(info(image).error().text() == "snapshot table offset 0 (header byte 64) is the header's own place");
    poke<uint64_t>(image, 64, 0x10000000);
    CHECK(info(image).error().text().find("lies past the end of the file") != std::string::npos);
  }
}

TEST_CASE("qcow2: a snapshot table is written as it was read, but for data that version 3 wants") {
  const MemImage image = with_table(make_qcow2({.size = 64_MiB}), {{24, "1", "a"}, {1000, "2", "bc"}, {40, "3", ""}});
  MemStorage storage(image);
  const qcow2::Header header = must(qcow2::read_header(storage, qcow2::Purpose::read));
  const qcow2::SnapshotTable table = must(qcow2::read_snapshot_table(storage, header));

  const std::vector<std::byte> encoded = qcow2::encode_snapshot_table(table);

  std::vector<std::byte> stored(table.length);
  image.read(kTable, stored);
  // Offset 32 of an entry: the short size of the VM state is 0 where only the long field can hold it.
  for (uint64_t at : {uint64_t{32}, uint64_t{72 + 32}, uint64_t{72 + 1048 + 32}})
    for (uint64_t i = 0; i < 4; ++i) stored[at + i] = std::byte{0};
  CHECK(encoded == stored);

  const MemImage short_one = with_table(image, {{0, "1", "a"}});
  MemStorage short_storage(short_one);
  const qcow2::SnapshotTable old_table =
      must(qcow2::read_snapshot_table(short_storage, must(qcow2::read_header(short_storage, qcow2::Purpose::read))));
  CHECK(old_table.snapshots[0].lacks_extra_data());
  CHECK(qcow2::encode_snapshot_table(old_table).size() == 64);
}
