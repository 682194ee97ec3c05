// The header: what is accepted, what is refused, and what stays as it was.
#include "format/qed/header.h"

#include <doctest/doctest.h>

#include <cstring>

#include "qed_bytes.h"
#include "support/crash_storage.h"

namespace imgfuse::test {
namespace {

std::string refusal(const CreateOptions& options) {
  const Result<> checked = qed::check_create_options(options);
  return checked ? "" : checked.error().text();
}

std::string open_error(const MemImage& image, bool read_only = true) {
  auto disk = open_image(std::make_shared<MemStorage>(image), {.read_only = read_only});
  if (!disk) return disk.error().text();
  must((*disk)->close());
  return "";
}

TEST_CASE("qed: a new image is what QEMU makes, byte by byte") {
  const MemImage image = make_qed({.size = 1_GiB});

  CHECK(image.size() == 327680);
  std::vector<std::byte> header(64);
  image.read(0, header);
  const unsigned char expected[64] = {0x51, 0x45, 0x44, 0, 0, 0, 1, 0, 4, 0, 0, 0, 1, 0, 0, 0,   0, 0,
                                      0,    0,    0,    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,   0, 0,
                                      0,    0,    0,    0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0x40};
  CHECK(std::memcmp(header.data(), expected, sizeof expected) == 0);
}

TEST_CASE("qed: a raw backing file is recorded as such, any other is not recorded") {
  for (const char* format : {"raw", "qcow2", "qed"}) {
    MemStorage storage;
    must(qed::create(storage, {.size = 1_MiB, .backing_file = "base", .backing_format = format}));

    CHECK(features_of(storage.image()) == (format == std::string("raw") ? 5 : 1));
    const ImageInfo info = must(qed::info(storage));
    CHECK(info.backing_filename == "base");
    CHECK(info.backing_format == (format == std::string("raw") ? std::optional<std::string>("raw") : std::nullopt));
  }
}

TEST_CASE("qed: every cluster size and table size is read and written") {
  for (uint32_t cluster = 4096; cluster <= 64_MiB; cluster *= 2)
    for (uint32_t table = 1; table <= 16; table *= 2) {
      CAPTURE(cluster);
      CAPTURE(table);
      const uint64_t coverage = uint64_t{cluster} * table / 8 * cluster;
      const uint64_t size = std::min(qed::max_image_size(cluster, table), coverage * 2);
      const auto memory = std::make_shared<MemStorage>(make_qed({size, cluster, table, {}}));
      auto disk = must(open_image(memory));
      must(disk->write(GuestOffset(cluster - 100), pattern(200, 1)));
      must(disk->write(GuestOffset(size - 300), pattern(300, 2)));
      must(disk->write_zeroes({GuestOffset(size / 2), 512}, Zeroing::may_free));
      must(disk->close());

      disk = must(open_image(memory, {.read_only = true}));
      CHECK(read_all(*disk, GuestOffset(cluster - 100), 200) == pattern(200, 1));
      CHECK(read_all(*disk, GuestOffset(size - 300), 300) == pattern(300, 2));
      must(disk->close());
      const CheckReport report = check_image(memory->image());
      CHECK(report.clean());
      CHECK(report.allocated_clusters == 3);
    }
}

TEST_CASE("qed: the largest disk is computed without wrapping around") {
  CHECK(qed::max_image_size(65536, 4) == 64_TiB);
  CHECK(qed::max_image_size(4096, 1) == 1_GiB);
  CHECK(qed::max_image_size(4_MiB, 4) == qed::kMaxFileBytes);  // 2^64, which QEMU takes for 0
  CHECK(qed::max_image_size(64_MiB, 16) == qed::kMaxFileBytes);

  CHECK(refusal({.size = 64_TiB}) == "");
  CHECK(refusal({.size = 64_TiB + 512}).find("too large") != std::string::npos);
}

TEST_CASE("qed: what QEMU could not open is not created") {
  CHECK(refusal({.size = 1_MiB, .table_size = 1}).find("QEMU cannot open") == 0);
  CHECK(refusal({.size = 1_MiB, .cluster_size = 4_MiB, .table_size = 4}).find("QEMU cannot open") == 0);
  CHECK(refusal({.size = 1_MiB, .cluster_size = 4_MiB, .table_size = 2}) == "");
}

TEST_CASE("qed: options that mean nothing in QED are refused") {
  CHECK(refusal({.size = 1_MiB, .version = 2}) == "a QED image has no versions; qcow2 has");
  CHECK(refusal({.size = 1_MiB, .cluster_size = 2048}) ==
        "cluster size 2048 is not a power of two between 4096 and 64 MiB");
  CHECK(refusal({.size = 1_MiB, .preallocation = Preallocation::full}) ==
        "a QED image has no preallocation; qcow2 has");
  CHECK(refusal({.size = 1_MiB, .table_size = 3}) == "table size 3 is not a power of two between 1 and 16");
  CHECK(refusal({.size = 1_MiB, .backing_file = "x"}) ==
        "the format of backing file x is not given; it is never guessed");
  CHECK(
      refusal({.size = 1_MiB, .backing_file = std::string(4033, 'x'), .backing_format = "raw", .cluster_size = 4096}) ==
      "the backing file name of 4033 bytes is longer than 4032");
}

TEST_CASE("qed: unknown features are refused, unknown compatible ones stay, autoclear ones go") {
  QedSample s;
  poke_le<uint64_t>(s.image, kFeaturesAt, 0x80);
  CHECK(open_error(s.image) == "the image needs features that imgfuse does not know: bits 0x80");

  poke_le<uint64_t>(s.image, kFeaturesAt, 0);
  poke_le<uint64_t>(s.image, kCompatAt, 0x700);
  poke_le<uint64_t>(s.image, kAutoclearAt, 0x5);
  const auto memory = std::make_shared<MemStorage>(s.image);
  must(must(open_image(memory, {.read_only = true}))->close());
  CHECK(peek_le<uint64_t>(memory->image(), kAutoclearAt) == 5);
  must(must(open_image(memory))->close());
  CHECK(peek_le<uint64_t>(memory->image(), kAutoclearAt) == 0);
  CHECK(peek_le<uint64_t>(memory->image(), kCompatAt) == 0x700);
}

TEST_CASE("qed: what lies behind the header's 64 bytes is not touched") {
  QedSample s;
  s.image.write(64, pattern(5000, 3));
  const auto memory = std::make_shared<MemStorage>(s.image);
  auto disk = must(open_image(memory));
  must(disk->write(GuestOffset(640_KiB), pattern(1000, 4)));  // sets NEED_CHECK, and clears it
  must(disk->resize(2_MiB));
  must(disk->close());

  std::vector<std::byte> behind(5000);
  memory->image().read(64, behind);
  CHECK(behind == pattern(5000, 3));
  CHECK(features_of(memory->image()) == 0);
}

TEST_CASE("qed: another backing file is recorded, and a crash leaves the old name or the new one") {
  for (const auto& lengths : {std::pair(4, 8), std::pair(400, 440), std::pair(900, 1500), std::pair(4, 3000)}) {
    CAPTURE(lengths.second);
    const std::string before(static_cast<size_t>(lengths.first), 'a');
    const std::string after(static_cast<size_t>(lengths.second), 'b');
    const MemImage image = make_qed({.size = 1_MiB, .backing = before});
    Rng rng(1);
    auto crash = std::make_shared<CrashStorage>(image);
    crash->set_observer([&] {
      for (const CrashMode mode : kCrashModes) {
        MemStorage left(crash->crash(mode, rng));
        const std::string name = must(qed::info(left)).backing_filename.value_or("");
        CHECK((name == before || name == after));
      }
    });

    must(qed::change_backing(*crash, after, "qcow2"));

    crash->set_observer({});
    CHECK(crash->pending() == 0);
    CHECK(must(qed::info(*crash)).backing_filename == after);
    CHECK(features_of(crash->image()) == 1);
    must(qed::change_backing(*crash, "", {}));
    CHECK(features_of(crash->image()) == 0);
    CHECK(peek_le<uint32_t>(crash->image(), kNameLengthAt) == 0);
  }
}

TEST_CASE("qed: a name that would have to overwrite the old one is refused") {
  MemStorage storage(make_qed({.size = 1_MiB, .cluster_size = 4096, .backing = std::string(2500, 'a')}));
  const MemImage before = storage.image();

  const Result<> changed = qed::change_backing(storage, std::string(2000, 'b'), "raw");

  REQUIRE(!changed);
  CHECK(changed.error().code() == ErrorCode::no_space);
  CHECK(must(qed::info(storage)).backing_filename == std::string(2500, 'a'));
}

TEST_CASE("qed: the backing file is not changed where unknown features may own the header's room") {
  QedSample s;
  poke_le<uint64_t>(s.image, kCompatAt, 1);
  MemStorage storage(s.image);
  CHECK(qed::change_backing(storage, "x", "raw").error().code() == ErrorCode::unsupported);
}

TEST_CASE("qed: amend changes whether the backing file counts as raw, and nothing else") {
  auto storage = std::make_shared<MemStorage>(make_qed({.size = 1_MiB, .backing = "base"}));
  must(qed::amend(storage, {.backing_format = "qcow2"}, {}));
  CHECK(features_of(storage->image()) == 1);
  must(qed::amend(storage, {.backing_format = "raw"}, {}));
  CHECK(features_of(storage->image()) == 5);
  CHECK(qed::amend(storage, {.compat = "1.1"}, {}).error().code() == ErrorCode::unsupported);
}

}  // namespace
}  // namespace imgfuse::test
