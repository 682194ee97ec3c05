// Rules of the format that other tests do not look at by themselves; the numbers are those of tests/RULES.md.
#include <doctest/doctest.h>

#include "base/math.h"
#include "bytes.h"
#include "core/codec.h"
#include "format/qcow2/header.h"
#include "imgfuse/snapshots.h"
#include "samples.h"
#include "support/builders.h"
#include "support/qcow2_view.h"

namespace imgfuse::test {
namespace {

using Bytestring = std::vector<std::byte>;

/// Where the L2 entries of the first table begin, of an image that has one.
uint64_t first_table(const MemImage& image) { return peek<uint64_t>(image, peek<uint64_t>(image, 40)) & kAddressBits; }

/// An image whose first cluster is written.
MemImage image_with_data(const Qcow2Spec& spec) {
  auto memory = std::make_shared<MemStorage>(make_qcow2(spec));
  auto disk = must(open_qcow2(memory));
  must(disk->write(GuestOffset(0), pattern(spec.cluster_size)));
  must(disk->close());
  return memory->image();
}

Bytestring read_image(const MemImage& image, uint64_t offset, size_t length, const MemImage& backing = {}) {
  auto disk = must(open_qcow2(std::make_shared<MemStorage>(image), {.read_only = true, .backing = backing}));
  Bytestring bytes = read_all(*disk, GuestOffset(offset), length);
  must(disk->close());
  return bytes;
}

MemImage filled(uint64_t size, uint64_t seed) {
  MemImage image;
  image.write(0, pattern(size, seed));
  return image;
}

Bytestring slice(const Bytestring& bytes, uint64_t offset, uint64_t length) {
  const auto begin = bytes.begin() + static_cast<ptrdiff_t>(offset);
  return {begin, begin + static_cast<ptrdiff_t>(length)};
}

TEST_CASE(
    "rules 29, 38 to 41: a stream begins at any byte, crosses clusters, shares its last sector or ends the file") {
  for (const uint32_t cluster_bits : {9u, 12u, 16u, 21u})
    for (const bool shared : {false, true}) {
      CAPTURE(cluster_bits);
      CAPTURE(shared);
      const uint64_t cluster = uint64_t{1} << cluster_bits;
      MemImage image = image_with_data({.size = cluster * 4, .cluster_size = 1u << cluster_bits});
      const Bytestring content = loose_pattern(cluster, 7);
      Bytestring stream(cluster);
      stream.resize(codec::deflate(content, stream));
      REQUIRE(!stream.empty());
      const uint64_t begin = round_up(image.size(), cluster) + cluster - 101;  // odd: bit 0 of the entry is address
      const uint64_t sectors = (begin + stream.size() - 1) / 512 - begin / 512;
      image.write(begin, stream);
      if (shared) image.write(begin + stream.size(), pattern(512));
      poke(image, first_table(image) + 16, kCompressedBit | sectors << (70 - cluster_bits) | begin);

      CHECK(image.size() == begin + stream.size() + (shared ? 512 : 0));
      CHECK(read_image(image, 2 * cluster, cluster) == content);
    }
}

TEST_CASE("rule 32: an entry without an offset is no allocation") {
  MemImage image = image_with_data({.size = 1_MiB, .backing = "base"});
  poke<uint64_t>(image, first_table(image), 0);

  CHECK(read_image(image, 0, 65536, filled(1_MiB, 5)) == slice(pattern(1_MiB, 5), 0, 65536));
  CHECK(check_image(image).leaks == 1);
}

TEST_CASE("rule 34: a zero cluster that keeps its space shows neither its old bytes nor the backing file") {
  for (const bool extended : {false, true}) {
    CAPTURE(extended);
    const WatchedDisk disk = open_watched(make_qcow2({.size = 1_MiB, .backing = "base", .extended_l2 = extended}),
                                          {.backing = filled(1_MiB, 5)});
    must(disk->write(GuestOffset(0), pattern(65536, 1)));
    must(disk->write_zeroes({GuestOffset(0), 65536}, Zeroing::keep_allocation));
    CHECK(read_all(*disk.disk, GuestOffset(0), 65536) == Bytestring(65536));

    must(disk->write(GuestOffset(30000), pattern(100, 2)));

    Bytestring expected(65536);
    const Bytestring written = pattern(100, 2);
    std::copy(written.begin(), written.end(), expected.begin() + 30000);
    CHECK(read_all(*disk.disk, GuestOffset(0), 65536) == expected);
    must(disk->close());
  }
}

TEST_CASE("rule 36: a file that ends inside a cluster reads as zeros from there") {
  MemImage image = image_with_data({.size = 1_MiB});
  image.resize(image.size() - 40000);

  Bytestring expected = pattern(65536);
  std::fill_n(expected.begin() + 65536 - 40000, 40000, std::byte{0});
  CHECK(read_image(image, 0, 65536) == expected);
}

TEST_CASE("rule 13: an L1 table that is longer than the disk needs keeps its length and what it leads to") {
  auto memory = std::make_shared<MemStorage>(make_qcow2({.size = 8_MiB, .cluster_size = 4096}));
  auto disk = must(open_qcow2(memory));
  must(disk->write(GuestOffset(6_MiB), pattern(4096)));  // a virtual machine's state lies behind the disk like this
  must(disk->close());
  MemImage image = memory->image();
  poke<uint64_t>(image, 24, 2_MiB);

  const WatchedDisk shorter = open_watched(image);
  must(shorter->write(GuestOffset(0), pattern(100000, 2)));
  must(shorter->snapshots()->create("one"));
  must(shorter->write(GuestOffset(0), pattern(100000, 3)));
  must(shorter->snapshots()->remove("one"));
  must(shorter->close());

  image = shorter.memory->image();
  CHECK(peek<uint32_t>(image, 36) == 4);
  CHECK(check_image(image).clean());
  poke<uint64_t>(image, 24, 8_MiB);
  CHECK(read_image(image, 6_MiB, 4096) == pattern(4096));
}

TEST_CASE("rule 2: a header of a crooked length is read, and written with a multiple of 8") {
  MemImage image = make_qcow2({.size = 1_MiB});
  image.zero(104, 1000);
  poke<uint32_t>(image, 100, 115);
  poke_text(image, 112, "end");
  MemStorage storage(image);

  const qcow2::Header header = must(qcow2::read_header(storage, qcow2::Purpose::write));
  const std::vector<std::byte> written = must(qcow2::encode_header(header));

  CHECK(header.unknown_tail.size() == 3);
  image.write(0, written);
  CHECK(peek<uint32_t>(image, 100) == 120);
  CHECK(peek<uint32_t>(image, 112) == 0x656e6400);
}

TEST_CASE("rule 18: a feature name that fills its 46 bytes needs no NUL") {
  MemImage image = make_qcow2({.size = 1_MiB});
  image.zero(112, 1000);
  const std::string name(46, 'x');
  poke<uint32_t>(image, 112, 0x6803f857);
  poke<uint32_t>(image, 116, 2 * 48);
  poke_text(image, 120, std::string{0, 33} + name + std::string{0, 34} + "next");
  poke<uint64_t>(image, 72, uint64_t{1} << 33);

  const auto refused = open_qcow2(std::make_shared<MemStorage>(image), {.read_only = true});

  REQUIRE_FALSE(refused);
  CHECK(refused.error().text().find("\"" + name + "\" (bit 33)") != std::string::npos);
}

TEST_CASE("rule q10: a backing file's name ends where its length says, whatever follows") {
  MemImage image = make_qcow2({.size = 1_MiB});
  poke_text(image, 1000, "base.img, and more");
  poke<uint64_t>(image, 8, 1000);
  poke<uint32_t>(image, 16, 8);
  MemStorage storage(image);

  CHECK(must(qcow2::info(storage)).backing_filename == "base.img");
}

TEST_CASE("rule q16: a disk of no bytes may have no L1 table") {
  MemImage image = make_qcow2({.size = 0});
  poke<uint32_t>(image, 36, 0);
  poke<uint64_t>(image, 40, 0);

  auto disk = must(open_qcow2(std::make_shared<MemStorage>(image), {.read_only = true}));
  CHECK(disk->size() == 0);
  must(disk->close());
}

TEST_CASE("rule 46: discarding a compressed cluster leaves the streams beside it") {
  const WatchedDisk disk = open_watched(make_qcow2({.size = 1_MiB}), {.compress = "zlib"});
  must(disk->write(GuestOffset(0), loose_pattern(3 * 65536, 1)));
  must(disk->flush());

  must(disk->discard({GuestOffset(65536), 65536}));
  must(disk->flush());
  must(disk->close());

  Bytestring expected = loose_pattern(3 * 65536, 1);
  std::fill_n(expected.begin() + 65536, 65536, std::byte{0});
  CHECK(read_image(disk.memory->image(), 0, 3 * 65536) == expected);
  CHECK(check_image(disk.memory->image()).clean());
}

/// 32 subclusters of 512 bytes; the first guest cluster is written whole.
MemImage extended_image() {
  return image_with_data({.size = 1_MiB, .cluster_size = 16384, .backing = "base", .extended_l2 = true});
}

TEST_CASE("rules 49 to 51: subclusters have their own bytes, zeros, or what lies below, with or without host space") {
  MemImage image = extended_image();
  const MemImage below = filled(1_MiB, 5);
  const Bytestring under = pattern(1_MiB, 5);
  const uint64_t table = first_table(image);
  const uint64_t host = peek<uint64_t>(image, table);
  poke<uint64_t>(image, table + 8, uint64_t{0xf0} << 32 | 0x0f);
  poke<uint64_t>(image, table + 16, 0);  // no host space, some zeros
  poke<uint64_t>(image, table + 24, uint64_t{1} << 63);
  CHECK(read_image(image, 0, 2048, below) == slice(pattern(16384), 0, 2048));
  CHECK(read_image(image, 2048, 2048, below) == Bytestring(2048));
  CHECK(read_image(image, 4096, 12288 + 16384 - 512, below) == slice(under, 4096, 12288 + 16384 - 512));
  CHECK(read_image(image, 32768 - 512, 512, below) == Bytestring(512));

  poke<uint64_t>(image, table + 8, 0);  // host space that is only reserved
  CHECK(read_image(image, 0, 16384, below) == slice(under, 0, 16384));
  poke<uint64_t>(image, table, host | 1);  // bit 0 is no zero flag here
  poke<uint64_t>(image, table + 8, 0xffffffff);
  CHECK(read_image(image, 0, 16384, below) == pattern(16384));
}

TEST_CASE("rules 50 and 52: bits that contradict each other are damage") {
  const MemImage whole = extended_image();
  const uint64_t table = first_table(whole);
  const uint64_t host = peek<uint64_t>(whole, table);
  const struct {
    uint64_t entry, bits;
  } wrong[] = {{host, uint64_t{1} << 32 | 0xffffffff}, {0, 1}, {kCompressedBit | (host & kAddressBits), 1}};
  for (const auto& each : wrong) {
    CAPTURE(each.entry);
    MemImage image = whole;
    poke(image, table, each.entry);
    poke(image, table + 8, each.bits);
    auto disk = must(open_qcow2(std::make_shared<MemStorage>(image), {.read_only = true}));
    Bytestring bytes(512);

    CHECK(disk->read(GuestOffset(8192), bytes).error().code() == ErrorCode::corrupt);
    CHECK(check_image(image).corruptions > 0);
    must(disk->close());
  }
}

TEST_CASE("rule 53: a small write fills its subcluster and marks no other") {
  const WatchedDisk disk =
      open_watched(make_qcow2({.size = 1_MiB, .cluster_size = 16384, .backing = "base", .extended_l2 = true}),
                   {.backing = filled(1_MiB, 5)});
  must(disk->write(GuestOffset(16384 + 5 * 512 + 10), pattern(20, 1)));
  must(disk->close());

  const MemImage image = disk.memory->image();
  CHECK(peek<uint64_t>(image, first_table(image) + 24) == 1 << 5);
  Bytestring expected = pattern(1_MiB, 5);
  const Bytestring written = pattern(20, 1);
  std::copy(written.begin(), written.end(), expected.begin() + 16384 + 5 * 512 + 10);
  CHECK(read_image(image, 0, 1_MiB, filled(1_MiB, 5)) == expected);
}

TEST_CASE("rule 54: subclusters that follow each other are one host read") {
  auto memory = std::make_shared<MemStorage>(make_qcow2({.size = 1_MiB, .extended_l2 = true}));
  auto disk = must(open_qcow2(memory));
  for (uint64_t i = 0; i < 64; ++i) must(disk->write(GuestOffset(i * 2048), pattern(2048, i)));
  (void)read_all(*disk, GuestOffset(0), 131072);
  memory->counts().reset();

  (void)read_all(*disk, GuestOffset(0), 131072);

  CHECK(memory->counts().reads == 1);
  must(disk->close());
}

TEST_CASE("rule 55: a discarded extended cluster is all zero bits and no host space") {
  const WatchedDisk disk = open_watched(extended_image(), {.backing = filled(1_MiB, 5)});
  must(disk->discard({GuestOffset(0), 16384}));
  must(disk->close());

  const MemImage image = disk.memory->image();
  CHECK(peek<uint64_t>(image, first_table(image)) == 0);
  CHECK(peek<uint64_t>(image, first_table(image) + 8) == uint64_t{0xffffffff} << 32);
  CHECK(check_image(image).clean());
}

TEST_CASE("rule 56: narrow counts fill each byte from its low bits") {
  for (const auto& [width, byte] : {std::pair{1u, 0x0f}, {2u, 0x55}, {4u, 0x11}, {8u, 0x01}}) {
    const uint32_t bits = width;
    CAPTURE(bits);
    const MemImage image = make_qcow2({.size = 1_MiB, .refcount_bits = bits});  // four clusters, each used once
    const uint64_t block = peek<uint64_t>(image, peek<uint64_t>(image, 48));
    CHECK(peek<uint8_t>(image, block) == byte);
    CHECK(peek<uint8_t>(image, block + 4) == 0);
  }
}

TEST_CASE("rule 62: rewriting, discarding and resizing again and again do not make the file longer") {
  const WatchedDisk disk = open_watched(make_qcow2({.size = 256_KiB, .cluster_size = 512}));
  uint64_t settled = 0;
  for (uint64_t round = 0; round < 40; ++round) {
    must(disk->resize(round % 2 == 0 ? 4_MiB : 256_KiB, {.shrink = true}));
    must(disk->discard({GuestOffset(0), 128_KiB}));
    must(disk->write(GuestOffset(round % 8 * 16384), pattern(65536, round)));
    must(disk->flush());
    if (round == 10) settled = must(disk.memory->size());
  }
  CHECK(must(disk.memory->size()) <= settled + 4096);
  must(disk->close());
  CHECK(check_image(disk.memory->image()).clean());
}

TEST_CASE("rule 63: the header's cluster is never given away, even if it is not counted") {
  Sample sample;
  sample.set_count(0, 0);
  auto memory = std::make_shared<MemStorage>(sample.image);
  auto disk = open_qcow2(memory);
  if (disk) {
    (void)(*disk)->write(GuestOffset(8 * Sample::kCluster), pattern(4 * Sample::kCluster));
    (void)(*disk)->close();
  }
  CHECK(peek<uint32_t>(memory->image(), 0) == 0x514649fb);
  CHECK(peek<uint64_t>(memory->image(), 40) == Sample::kL1);
}

TEST_CASE("rule 73: what the user has set stays set") {
  MemImage image = make_qcow2({.size = 1_MiB, .compression = "zstd"});
  poke<uint64_t>(image, 80, 1);  // lazy refcounts
  const WatchedDisk disk = open_watched(image);
  must(disk->write(GuestOffset(0), pattern(1000)));
  must(disk->resize(600_MiB));
  must(disk->snapshots()->create("one"));
  must(disk->close());

  const MemImage after = disk.memory->image();
  CHECK(peek<uint64_t>(after, 72) == 8);
  CHECK(peek<uint64_t>(after, 80) == 1);
  CHECK(peek<uint8_t>(after, 104) == 1);
}

TEST_CASE("rule 81: an image of version 2 with snapshots keeps its size") {
  const WatchedDisk disk = open_watched(make_qcow2({.size = 1_MiB, .version = 2}));
  must(disk->snapshots()->create("one"));

  CHECK(disk->resize(2_MiB).error().code() == ErrorCode::unsupported);
  CHECK(disk->resize(512_KiB, {.shrink = true}).error().code() == ErrorCode::unsupported);
  CHECK(disk->size() == 1_MiB);
  must(disk->close());
}

}  // namespace
}  // namespace imgfuse::test
