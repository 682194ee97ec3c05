#include "format/qcow2/header.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "bytes.h"
#include "format/qcow2/header_update.h"
#include "support/builders.h"
#include "support/intercepted_storage.h"

using namespace imgfuse;
using namespace imgfuse::test;
using qcow2::Header;
using qcow2::Purpose;

namespace {

Result<Header> read(const MemImage& image, Purpose purpose = Purpose::write) {
  MemStorage storage(image);
  return qcow2::read_header(storage, purpose);
}

void check_refused(const MemImage& image, const std::string& text, Purpose purpose = Purpose::write) {
  const Result<Header> header = read(image, purpose);
  REQUIRE_FALSE(header);
  INFO(header.error().text());
  CHECK(header.error().text().find(text) != std::string::npos);
}

/// Where the extensions of an image start.
constexpr uint64_t kExtensions = 112;

/// Puts an extension at `at`; returns the place behind it.
uint64_t poke_extension(MemImage& image, uint64_t at, uint32_t type, const std::string& data) {
  poke<uint32_t>(image, at, type);
  poke<uint32_t>(image, at + 4, static_cast<uint32_t>(data.size()));
  poke_text(image, at + 8, data);
  return at + 8 + (data.size() + 7) / 8 * 8;
}

/// An entry of the feature name table.
std::string feature_name(char kind, char bit, std::string name) {
  name.resize(46);
  return std::string{kind, bit} + name;
}

MemImage rewritten(const MemImage& image, const Header& header) {
  MemImage copy = image;
  copy.zero(0, header.cluster_size());
  copy.write(0, must(qcow2::encode_header(header)));
  return copy;
}

}  // namespace

TEST_CASE("qcow2 header: one that is replaced while it is read is read again") {
  /// Who has the image open makes and takes away a mark, which moves the name of the backing file, beside each read.
  class ReplacedMeanwhile final : public InterceptedStorage {
   public:
    using InterceptedStorage::InterceptedStorage;
    unsigned times = 0;

   private:
    void after(Call call, HostRange) override {
      if (call != Call::read || times == 0) return;
      --times;
      Header header = must(qcow2::read_header(inner(), Purpose::info));
      header.counts_ahead = !header.counts_ahead;
      must(qcow2::replace_header(inner(), header));
    }
  };
  ReplacedMeanwhile storage(std::make_shared<MemStorage>(make_qcow2({.backing = "base.raw"})));
  for (const unsigned times : {1u, 2u, 3u, 4u, 15u}) {
    CAPTURE(times);
    storage.times = times;
    CHECK(must(qcow2::read_header(storage, Purpose::info)).backing_name == "base.raw");
  }
  storage.times = 1000;
  CHECK(qcow2::read_header(storage, Purpose::info).error().code() == ErrorCode::busy);
}

TEST_CASE("qcow2 header: what create wrote is read back") {
  const Header header = must(read(make_qcow2({.size = 1_GiB, .cluster_size = 4096, .refcount_bits = 2})));

  CHECK(header.version == 3);
  CHECK(header.cluster_size() == 4096);
  CHECK(header.size == 1_GiB);
  CHECK(header.refcount_order == 1);
  CHECK(header.max_refcount() == 3);
  CHECK(header.l1_entries == 1_GiB / header.l2_coverage());
  CHECK(header.header_length == 112);
}

TEST_CASE("qcow2 header: every field out of range is refused with its value and its place") {
  struct Field {
    uint64_t offset;
    int width;
    uint64_t value;
    const char* text;
  };
  const Field fields[] = {
      {0, 4, 0x514649fa, "not a qcow2 image: it starts with 514649fa"},
      {4, 4, 1, "qcow2 version 1 (header byte 4) is neither 2 nor 3"},
      {4, 4, 4, "qcow2 version 4 (header byte 4) is neither 2 nor 3"},
      {8, 8, 8, "backing file name at byte 8 (header byte 8) is not between the header's end 112"},
      {8, 8, 65537, "backing file name at byte 65537 (header byte 8) is not between"},
      {8, 8, ~uint64_t{0}, "(header byte 8) is not between"},
      {20, 4, 8, "cluster_bits 8 (header byte 20) is not between 9 and 21"},
      {20, 4, 22, "cluster_bits 22 (header byte 20) is not between 9 and 21"},
      {20, 4, 0xffffffff, "cluster_bits 4294967295 (header byte 20)"},
      {24, 8, 1_TiB, "L1 table of 1 entries (header byte 36) is too small"},
      {24, 8, ~uint64_t{0}, "L1 table of 1 entries (header byte 36) is too small"},
      {32, 4, 3, "encryption method 3 (header byte 32) is not 0, 1 or 2"},
      {32, 4, 1, "AES encryption is not supported"},
      {32, 4, 2, "LUKS encryption (header byte 32) without an encryption header extension"},
      {36, 4, 0, "L1 table of 0 entries (header byte 36) is too small"},
      {36, 4, 4194305, "L1 table of 4194305 entries (header byte 36) is larger than 32 MiB"},
      {40, 8, 0, "L1 table offset 0 (header byte 40)"},
      {40, 8, 0x30200, "L1 table offset 0x30200 (header byte 40) is not a multiple of the cluster size 65536"},
      {40, 8, uint64_t{1} << 63, "L1 table offset 0x8000000000000000 (header byte 40) is not below 2^63"},
      {40, 8, 0xffffffffffff0000, "(header byte 40) is not below 2^63"},
      {40, 8, 0x40000, "L1 table at 0x40000 lies past the end of the file (0x40000)"},
      {48, 8, 0, "refcount table offset 0 (header byte 48)"},
      {48, 8, 0x10008, "refcount table offset 0x10008 (header byte 48) is not a multiple"},
      {48, 8, uint64_t{1} << 63, "refcount table offset 0x8000000000000000 (header byte 48) is not below 2^63"},
      {48, 8, 0x30000, "refcount table at 0x30000 and L1 table at 0x30000 overlap"},
      {48, 8, 0x1000000, "refcount table at 0x1000000 lies past the end of the file"},
      {56, 4, 0, "the refcount table has 0 clusters (header byte 56)"},
      {56, 4, 129, "refcount table of 129 clusters (header byte 56) is larger than 8 MiB"},
      {56, 4, 0xffffffff, "refcount table of 4294967295 clusters (header byte 56) is larger than 8 MiB"},
      {60, 4, 65537, "65537 snapshots (header byte 60) are more than 65536"},
      {64, 8, 0x200, "snapshot table offset 0x200 (header byte 64) is not a multiple"},
      {72, 8, 2, "the image is marked corrupt; it can be read, and `imgfuse check --repair all`"},
      {72, 8, 8, "compression type 0 (header byte 104) contradicts incompatible feature bit 3, which is set"},
      {72, 8, 32, "incompatible features that imgfuse does not know: bit 5"},
      {72, 8, uint64_t{1} << 63, "incompatible features that imgfuse does not know: bit 63"},
      {96, 4, 7, "refcount_order 7 (header byte 96) is larger than 6"},
      {100, 4, 103, "header_length 103 (header byte 100) is not between 104 and the cluster size 65536"},
      {100, 4, 65537, "header_length 65537 (header byte 100)"},
      {104, 1, 1, "compression type 1 (header byte 104) contradicts incompatible feature bit 3, which is clear"},
  };
  const MemImage whole = make_qcow2({.size = 64_MiB});
  for (const Field& field : fields) {
    CAPTURE(field.offset);
    CAPTURE(field.value);
    MemImage image = whole;
    if (field.width == 1) poke(image, field.offset, static_cast<uint8_t>(field.value));
    if (field.width == 4) poke(image, field.offset, static_cast<uint32_t>(field.value));
    if (field.width == 8) poke(image, field.offset, field.value);
    check_refused(image, field.text);
  }
}

TEST_CASE("qcow2 header: two fields that contradict each other are refused") {
  MemImage image = make_qcow2({});
  SUBCASE("unknown compression type") {
    poke<uint64_t>(image, 72, 8);
    poke<uint8_t>(image, 104, 2);
    check_refused(image, "compression type 2 (header byte 104) is neither 0 (zlib) nor 1 (zstd)");
  }
  SUBCASE("backing name longer than 1023") {
    poke<uint64_t>(image, 8, 1024);
    poke<uint32_t>(image, 16, 1024);
    check_refused(image, "backing file name of 1024 bytes (header byte 16) is longer than 1023");
  }
  SUBCASE("backing name past the first cluster") {
    poke<uint64_t>(image, 8, 65530);
    poke<uint32_t>(image, 16, 7);
    check_refused(image, "passes the first cluster's end 65536");
  }
  SUBCASE("small clusters with extended L2 entries") {
    MemImage small = make_qcow2({.size = 1_MiB, .cluster_size = 8192});
    poke<uint64_t>(small, 72, 16);
    check_refused(small, "extended L2 entries need cluster_bits of 14 or more, header byte 20 says 13", Purpose::info);
  }
  SUBCASE("L1 table too small for extended L2 entries") {
    MemImage large = make_qcow2({.size = 1_GiB});
    poke<uint64_t>(large, 72, 16);
    check_refused(large, "L1 table of 2 entries (header byte 36) is too small", Purpose::info);
  }
}

TEST_CASE("qcow2 header: a file that ends inside the header is refused") {
  for (const uint64_t size : {0, 3, 8, 71, 103}) {
    CAPTURE(size);
    MemImage image = make_qcow2({});
    image.resize(size);
    check_refused(image, size < 4 ? "not a qcow2 image" : size < 8 ? "version" : "the file ends inside the header");
  }
}

TEST_CASE("qcow2 header: extensions that do not fit are refused") {
  MemImage image = make_qcow2({});
  image.zero(kExtensions, 65536 - kExtensions);
  SUBCASE("longer than the cluster") {
    poke<uint32_t>(image, kExtensions, 0x12345678);
    poke<uint32_t>(image, kExtensions + 4, 65536 - kExtensions - 7);
    check_refused(image, "header extension 12345678 at byte 112 is 65417 bytes long, but only 65416 are left");
  }
  SUBCASE("length overflows") {
    poke<uint32_t>(image, kExtensions, 0x12345678);
    poke<uint32_t>(image, kExtensions + 4, 0xffffffff);
    check_refused(image, "header extension 12345678 at byte 112 is 4294967295 bytes long");
  }
  SUBCASE("into the backing name") {
    poke_extension(image, kExtensions, 0x12345678, "0123456789abcdef");
    poke<uint64_t>(image, 8, kExtensions + 16);
    poke<uint32_t>(image, 16, 4);
    check_refused(image, "header extension 12345678 at byte 112 is 16 bytes long, but only 8 are left");
  }
  SUBCASE("no room for its head") {
    poke<uint64_t>(image, 8, kExtensions + 4);
    poke<uint32_t>(image, 16, 4);
    check_refused(image, "header extension at byte 112 has no room");
  }
  SUBCASE("backing format name too long") {
    poke_extension(image, kExtensions, 0xe2792aca, "0123456789abcdef");
    check_refused(image, "backing format name of 16 bytes is longer than 15");
  }
  SUBCASE("data file name too long") {
    poke_extension(image, kExtensions, 0x44415441, std::string(4096, 'n'));
    check_refused(image, "data file name of 4096 bytes is longer than 4095");
  }
  SUBCASE("bitmaps of the wrong size") {
    poke_extension(image, kExtensions, 0x23852875, "0123456789abcdef");
    check_refused(image, "bitmaps header extension has 16 bytes instead of 24");
  }
  SUBCASE("encryption header without encryption") {
    poke_extension(image, kExtensions, 0x0537be77, "0123456789abcdef");
    check_refused(image, "encryption header extension in an image with encryption method 0");
  }
  SUBCASE("encryption header of the wrong size") {
    poke<uint32_t>(image, 32, 2);
    poke_extension(image, kExtensions, 0x0537be77, "0123");
    check_refused(image, "encryption header extension has 4 bytes instead of 16");
  }
}

TEST_CASE("qcow2 header: LUKS images are understood for info, and refused by name for reading") {
  MemImage image = make_qcow2({});
  poke<uint32_t>(image, 32, 2);
  poke_extension(image, kExtensions, 0x0537be77, "0123456789abcdef");

  CHECK(must(read(image, Purpose::info)).crypt_method == 2);
  check_refused(image, "LUKS encryption is not supported", Purpose::read);
}

TEST_CASE("qcow2 header: unknown incompatible bits are named as the image names them") {
  MemImage image = make_qcow2({});
  image.zero(kExtensions, 1000);
  poke_extension(image, kExtensions, 0x6803f857, feature_name(1, 5, "wrong kind") + feature_name(0, 5, "warp core"));
  poke<uint64_t>(image, 72, 1 << 5 | 1 << 6);

  for (const Purpose purpose : {Purpose::info, Purpose::read, Purpose::write, Purpose::repair})
    check_refused(image, "imgfuse does not know: \"warp core\" (bit 5), bit 6", purpose);
}

TEST_CASE("qcow2 header: control characters in a feature name do not reach the message") {
  MemImage image = make_qcow2({});
  image.zero(kExtensions, 1000);
  poke_extension(image, kExtensions, 0x6803f857, feature_name(0, 5, "\x1b[31m"));
  poke<uint64_t>(image, 72, 1 << 5);

  check_refused(image, "\"?[31m\" (bit 5)");
}

TEST_CASE("qcow2 header: a purpose decides what damage is tolerated") {
  MemImage image = make_qcow2({});
  SUBCASE("corrupt bit: reading and repair") {
    poke<uint64_t>(image, 72, 2);
    CHECK(read(image, Purpose::read));
    CHECK(read(image, Purpose::repair));
    CHECK(read(image, Purpose::write).error().code() == ErrorCode::corrupt);
  }
  SUBCASE("dirty bit: everything") {
    poke<uint64_t>(image, 72, 1);
    CHECK(read(image, Purpose::read));
    CHECK(read(image, Purpose::write));
  }
  SUBCASE("no refcount table: repair") {
    poke<uint32_t>(image, 56, 0);
    CHECK(read(image, Purpose::repair));
    CHECK_FALSE(read(image, Purpose::read));
  }
  SUBCASE("refcount table over the header: reading") {
    poke<uint64_t>(image, 48, 0);
    CHECK(read(image, Purpose::read));
    CHECK(read(image, Purpose::repair));
  }
  SUBCASE("external data file without a name") {
    poke<uint64_t>(image, 72, 4);
    CHECK(must(read(image, Purpose::info)).has_data_file());
    CHECK_FALSE(must(read(image, Purpose::read)).data_file);
  }
}

TEST_CASE("qcow2 header: unknown compatible and autoclear bits are kept and harmless") {
  MemImage image = make_qcow2({});
  poke<uint64_t>(image, 80, uint64_t{1} << 40);
  poke<uint64_t>(image, 88, uint64_t{1} << 41);

  const Header header = must(read(image));

  CHECK(header.compatible == uint64_t{1} << 40);
  CHECK(header.autoclear == uint64_t{1} << 41);
}

TEST_CASE("qcow2 header: a rewrite keeps unknown extensions, unknown header bytes and the rest") {
  MemImage image = make_qcow2({.size = 8_MiB});
  image.zero(kExtensions, 1000);
  poke<uint32_t>(image, 100, 136);  // 24 bytes that a later version of the format knows
  poke_text(image, 112, "bytes of the far future!");
  uint64_t at = poke_extension(image, 136, 0xe2792aca, "raw");
  at = poke_extension(image, at, 0x11111111, "first");
  at = poke_extension(image, at, 0x22222222, "");
  at = poke_extension(image, at, 0x11111111, "the same type again");
  poke<uint64_t>(image, 8, at + 8);
  poke<uint32_t>(image, 16, 8);
  poke_text(image, at + 8, "base.img");

  const Header first = must(read(image));
  const Header second = must(read(rewritten(image, first)));

  CHECK(second.header_length == 136);
  CHECK(second.unknown_tail.size() == 24);
  CHECK(second.unknown_tail == first.unknown_tail);
  CHECK(second.backing_name == "base.img");
  CHECK(second.backing_format == "raw");
  REQUIRE(second.extensions.size() == 3);
  for (size_t i = 0; i < 3; ++i) {
    CHECK(second.extensions[i].type == first.extensions[i].type);
    CHECK(second.extensions[i].data == first.extensions[i].data);
  }
  CHECK(second.size == first.size);
  CHECK(second.l1_offset == first.l1_offset);
  CHECK(must(qcow2::encode_header(second)) == must(qcow2::encode_header(first)));
}

TEST_CASE("qcow2 header: a header of 104 bytes has no compression type, and gains one when rewritten") {
  MemImage image = make_qcow2({});
  image.zero(104, 1000);
  poke<uint32_t>(image, 100, 104);

  const Header header = must(read(image));
  CHECK(header.unknown_tail.empty());
  CHECK(header.compression == qcow2::Compression::deflate);

  CHECK(must(read(rewritten(image, header))).header_length == 112);
}

TEST_CASE("qcow2 header: version 2 ends at byte 72, where its extensions begin") {
  MemImage image = make_qcow2({.version = 2});
  image.zero(72, 1000);
  const uint64_t end = poke_extension(image, 72, 0xe2792aca, "qcow2");
  poke<uint64_t>(image, 8, end + 8);
  poke<uint32_t>(image, 16, 1);
  poke_text(image, end + 8, "b");

  const Header header = must(read(image));

  CHECK(header.version == 2);
  CHECK(header.incompatible == 0);  // although the bytes there are not zero
  CHECK(header.refcount_order == 4);
  CHECK(header.header_length == 72);
  CHECK(header.backing_format == "qcow2");
  CHECK(header.backing_name == "b");
  const Header again = must(read(rewritten(image, header)));
  CHECK(again.backing_format == "qcow2");
  CHECK(again.backing_name == "b");
}

TEST_CASE("qcow2 header: names end at their first NUL, as other programs read them") {
  MemImage image = make_qcow2({});
  image.zero(kExtensions, 1000);
  poke_extension(image, kExtensions, 0xe2792aca, std::string("raw\0\0\0", 6));
  poke<uint64_t>(image, 8, 1000);
  poke<uint32_t>(image, 16, 6);
  poke_text(image, 1000, "base");

  const Header header = must(read(image));

  CHECK(header.backing_format == "raw");
  CHECK(header.backing_name == "base");
}

TEST_CASE("qcow2 header: an empty backing name is none") {
  MemImage image = make_qcow2({});
  poke<uint64_t>(image, 8, 1000);

  CHECK_FALSE(must(read(image)).backing_name);
}

TEST_CASE("qcow2 header: the remainder of a size that is no multiple of 512 is ignored") {
  MemImage image = make_qcow2({.size = 1_MiB});
  poke<uint64_t>(image, 24, 1_MiB + 511);

  CHECK(must(read(image)).size == 1_MiB);
}

TEST_CASE("qcow2 header: more than a cluster is not encoded") {
  Header header = must(read(make_qcow2({.size = 1_MiB, .cluster_size = 512})));
  header.backing_name = std::string(500, 'x');

  const auto encoded = qcow2::encode_header(header);

  REQUIRE_FALSE(encoded);
  CHECK(encoded.error().code() == ErrorCode::no_space);
  CHECK(encoded.error().text() ==
        "the header with its extensions and backing file name needs 620 bytes, a cluster has 512");
}

TEST_CASE("qcow2 header: names too long to be read are not encoded") {
  Header header = must(read(make_qcow2({})));
  header.backing_name = std::string(1024, 'x');
  CHECK_FALSE(qcow2::encode_header(header));
  header.backing_name = std::string(1023, 'x');
  CHECK(qcow2::encode_header(header));
  header.backing_format = std::string(16, 'x');
  CHECK_FALSE(qcow2::encode_header(header));
}

TEST_CASE("qcow2 header: the largest disk follows from the cluster size") {
  CHECK(qcow2::max_virtual_size(9) == 128_GiB);
  CHECK(qcow2::max_virtual_size(12) == 8_TiB);
  CHECK(qcow2::max_virtual_size(16) == uint64_t{2} << 50);
  CHECK(qcow2::max_virtual_size(21) == uint64_t{2} << 60);
}

TEST_CASE("qcow2: a probe wants the magic and version 2 or later") {
  const MemImage image = make_qcow2({});
  std::byte first[8];
  image.read(0, first);
  CHECK(qcow2::probe(first));
  CHECK_FALSE(qcow2::probe(std::span(first).first(7)));
  first[7] = std::byte{1};
  CHECK_FALSE(qcow2::probe(first));
}
