// What a new FVD image is byte by byte, and what amend changes in it.
#include <doctest/doctest.h>

#include "fvd_bytes.h"
#include "support/builders.h"

namespace imgfuse::test {
namespace {

std::string text_at(const MemImage& image, uint64_t offset) {
  std::string text;
  for (; const char c = static_cast<char>(peek_le<uint8_t>(image, offset)); ++offset) text += c;
  return text;
}

Result<MemImage> create(const CreateOptions& options, Disk* base = nullptr) {
  IMG_TRY(fvd::check_create_options(options));
  MemStorage storage;
  IMG_TRY(fvd::create(storage, options, base));
  return storage.image();
}

CreateOptions over_base(uint64_t size) {
  return {.format = "fvd", .size = size, .backing_file = "base.raw", .backing_format = "raw"};
}

MemImage empty(uint64_t size) {
  MemImage image;
  image.resize(size);
  return image;
}

}  // namespace

TEST_CASE("fvd create: without a base and not compact there is a header and nothing else") {
  const MemImage image = must(create({.format = "fvd", .size = 1_MiB}));

  CHECK(peek_le<uint32_t>(image, 0) == 0x5143F5A9);
  CHECK(peek_le<uint32_t>(image, 4) == 1);
  CHECK(peek_le<uint32_t>(image, kAllData) == 1);
  CHECK(peek_le<uint64_t>(image, kSize) == 1_MiB);
  CHECK(peek_le<uint64_t>(image, kMetadataSize) == 8192);
  CHECK(peek_le<uint64_t>(image, kJournalSize) == 0);
  CHECK(peek_le<uint32_t>(image, kClean) == 1);
  CHECK(image.size() == 8192 + 1_MiB);
  std::vector<std::byte> rest(8192 - 4336);
  image.read(4336, rest);
  CHECK(rest == std::vector<std::byte>(rest.size()));
}

TEST_CASE("fvd create: the defaults with a base are the original's") {
  auto base = make_raw_disk(empty(10_MiB + 100));
  const MemImage image = must(create(over_base(16_MiB), base.get()));

  CHECK(peek_le<uint32_t>(image, kAllData) == 0);
  CHECK(text_at(image, kBaseName) == "base.raw");
  CHECK(text_at(image, kBaseFormat) == "raw");
  CHECK(peek_le<uint64_t>(image, kBaseSize) == 10_MiB + 512);
  CHECK(peek_le<uint32_t>(image, kBlockSize) == 512);
  CHECK(peek_le<uint64_t>(image, kBitmapOffset) == 8192);
  CHECK(peek_le<uint64_t>(image, kBitmapSize) == 4096);
  CHECK(peek_le<uint64_t>(image, kJournalOffset) == 12288);
  CHECK(peek_le<uint64_t>(image, kJournalSize) == 16_MiB);
  CHECK(peek_le<uint64_t>(image, kMetadataSize) == 12288 + 16_MiB);
  CHECK(peek_le<uint32_t>(image, kCopyOnRead) == 0);
  CHECK(peek_le<uint64_t>(image, 1100) == 2000000);
  const std::vector<std::pair<uint64_t, uint32_t>> prefetch = {
      {2148, 0xFFFFFFFF}, {2168, 2},    {2172, 1048576},   {2176, 100},        {2180, 100},
      {2184, 80},         {2188, 5120}, {2192, 5120},      {2196, 1000000000}, {2200, 1000000000},
      {2204, 30000},      {4312, 4096}, {4316, 0xFFFFFFFF}};
  for (const auto& field : prefetch) {
    CAPTURE(field.first);
    CHECK(peek_le<uint32_t>(image, field.first) == field.second);
  }
}

TEST_CASE("fvd create: sizes are rounded as the original rounds them") {
  auto base = make_raw_disk(empty(10_MiB));
  CreateOptions options = over_base(100_MiB);
  options.fvd.compact = true;
  options.fvd.block_size = 1000;
  options.fvd.chunk_size = 5000;
  options.fvd.storage_grow_unit = 1;
  options.fvd.journal_size = 1;
  options.fvd.prefetch_start_delay = 0;
  const MemImage image = must(create(options, base.get()));

  CHECK(peek_le<uint32_t>(image, kBlockSize) == 1024);
  CHECK(peek_le<uint64_t>(image, kChunkSize) == 8192);
  CHECK(peek_le<uint64_t>(image, kGrowUnit) == 8192);
  const uint64_t entries = 100_MiB / 8192;
  CHECK(peek_le<uint64_t>(image, kTableOffset) == 8192 + 4096);
  CHECK(peek_le<uint64_t>(image, kJournalOffset) == 8192 + 4096 + (entries * 4 + 4095) / 4096 * 4096);
  CHECK(peek_le<uint64_t>(image, kJournalSize) == ((entries + 120) / 121 * 512 + 4095) / 4096 * 4096);
  CHECK(peek_le<uint32_t>(image, 2148) == 0xFFFFFFFF);
  for (uint64_t i = 0; i < entries; i += 100) CHECK(peek_le<uint32_t>(image, table_of(image) + i * 4) == 0xFFFFFFFF);
}

TEST_CASE("fvd create: the automatic block size keeps the bitmap at 4 MiB") {
  for (const auto& expected :
       {std::pair<uint64_t, uint32_t>(16_GiB, 512), {16_GiB + 512, 1024}, {32_GiB, 1024}, {100_GiB, 4096}}) {
    const auto [size, block] = expected;
    CAPTURE(expected.first);
    CreateOptions options = over_base(size);
    options.fvd.journal_size = 4096;
    auto base = make_raw_disk(empty(size));
    CHECK(peek_le<uint32_t>(must(create(options, base.get())), kBlockSize) == block);
  }
}

TEST_CASE("fvd create: what makes no sense is refused in words") {
  struct Case {
    std::function<void(CreateOptions&)> change;
    std::string says;
  };
  const std::vector<Case> cases = {
      {[](CreateOptions& o) { o.fvd.compact = true, o.fvd.block_size = 7680; }, "not a multiple of the block size"},
      {[](CreateOptions& o) { o.fvd.chunk_size = 0; }, "chunk size 0"},
      {[](CreateOptions& o) { o.fvd.block_size = 0; }, "block size 0"},
      {[](CreateOptions& o) { o.fvd.block_size = uint64_t{1} << 40; }, "block size"},
      {[](CreateOptions& o) { o.fvd.journal_size = uint64_t{1} << 50; }, "journal size"},
      {[](CreateOptions& o) { o.fvd.detect_sparse_hole = 1_GiB; }, "detect_sparse_hole"},
      {[](CreateOptions& o) {
         o.backing_file.reset(), o.fvd.compact = true, o.size = uint64_t{1} << 50, o.fvd.chunk_size = 4096;
       },
       "table"},
      {[](CreateOptions& o) { o.backing_file.reset(), o.backing_format.reset(), o.fvd.copy_on_read = true; },
       "need a backing file"},
      {[](CreateOptions& o) { o.backing_file = std::string(1024, 'a'); }, "1023 is the most"},
      {[](CreateOptions& o) { o.fvd.add_storage_command = std::string(2048, 'a'); }, "2047 is the most"},
      {[](CreateOptions& o) { o.preallocation = Preallocation::metadata; }, "preallocated"},
      {[](CreateOptions& o) { o.data_file_raw = true; }, "data_file_raw"},
  };
  for (const Case& c : cases) {
    CAPTURE(c.says);
    CreateOptions options = over_base(1_MiB);
    c.change(options);
    const auto refused = fvd::check_create_options(options);
    CHECK_FALSE(refused);
    if (!refused) CHECK(refused.error().text().find(c.says) != std::string::npos);
  }
}

TEST_CASE("fvd create: holes of the base are found to its end, and not read from there") {
  MemImage content = empty(1_MiB + 66048);
  content.write(200 * 1024, pattern(4096));
  content.write(1_MiB, pattern(512));
  auto base = make_raw_disk(content);
  CreateOptions options = over_base(content.size());
  options.fvd.block_size = 4096;
  options.fvd.detect_sparse_hole = 64_KiB;
  const MemImage image = must(create(options, base.get()));

  CHECK(peek_le<uint32_t>(image, kNeedZeroInit) == 1);
  const auto in_image = [&](uint64_t block) {
    return (peek_le<uint8_t>(image, 8192 + block / 8) >> (block % 8) & 1) != 0;
  };
  for (uint64_t block = 0; block < 16 * 16; ++block) CHECK(in_image(block) == (block / 16 != 3));
  for (uint64_t block = 256; block < 272; ++block) CHECK_FALSE(in_image(block));  // the window with data at 1 MiB
  CHECK(in_image(272));                                                           // the one the end cuts
  auto disk = must(open_fvd(std::make_shared<MemStorage>(image), {.backing = content}));
  std::vector<std::byte> wanted(content.size());
  content.read(0, wanted);
  CHECK(read_all(*disk, GuestOffset(0), wanted.size()) == wanted);
  must(disk->close());
}

TEST_CASE("fvd amend: settings change in their fields, and nothing else") {
  auto base = make_raw_disk(empty(1_MiB));
  MemStorage storage(must(create(over_base(1_MiB), base.get())));
  const MemImage before = storage.image();

  AmendOptions options;
  options.fvd.copy_on_read = true;
  options.fvd.prefetch_start_delay = 7;
  options.fvd.max_outstanding_copy_on_read_data = 4_MiB;
  options.fvd.prefetch_throttle_time = 50;
  must(fvd::amend(storage, options));

  const MemImage after = storage.image();
  CHECK(peek_le<uint32_t>(after, kCopyOnRead) == 1);
  CHECK(peek_le<uint32_t>(after, 2148) == 7);
  CHECK(peek_le<uint64_t>(after, 1100) == 4_MiB);
  CHECK(peek_le<uint32_t>(after, 2204) == 50);
  for (uint64_t at = 0; at < 8192; at += 4)
    if (at != kCopyOnRead && at != 2148 && at != 1100 && at != 2204)
      CHECK(peek_le<uint32_t>(after, at) == peek_le<uint32_t>(before, at));
  CHECK(must(fvd::info(storage)).fvd->copying.start_delay == 7);
}

TEST_CASE("fvd amend: an image whose journal holds changes is not called clean") {
  FvdSpec spec{.size = 1_MiB};
  spec.own.compact = true;
  MemImage image = make_fvd(spec);
  poke_le<uint32_t>(image, kClean, 0);
  MemStorage storage(image);
  AmendOptions options;
  options.fvd.clean_shutdown = true;

  const auto refused = fvd::amend(storage, options);

  REQUIRE_FALSE(refused);
  CHECK(refused.error().text().find("imgfuse check") != std::string::npos);
}

TEST_CASE("fvd amend: the data file and the formats of other files can be corrected") {
  auto base = make_raw_disk(empty(1_MiB));
  CreateOptions with_data = over_base(1_MiB);
  with_data.data_file = "old.dat";
  MemStorage storage(must(create(with_data, base.get())));
  AmendOptions options;
  options.backing_format = "qcow2";
  options.fvd.data_file = "new.dat";
  options.fvd.data_file_format = "qcow2";

  must(fvd::amend(storage, options));

  const ImageInfo info = must(fvd::info(storage));
  CHECK(info.backing_format == "qcow2");
  CHECK(info.fvd->data_file == "new.dat");
  CHECK(info.fvd->data_file_format == "qcow2");
  options.fvd.data_file = std::string(500, 'a');
  CHECK_FALSE(fvd::amend(storage, options));
  MemStorage without(must(create({.format = "fvd", .size = 1_MiB})));
  CHECK_FALSE(fvd::amend(without, options));
}

TEST_CASE("fvd amend: options of qcow2 are refused") {
  MemStorage storage(must(create({.format = "fvd", .size = 1_MiB})));
  AmendOptions options;
  options.compat = "1.1";

  CHECK_FALSE(fvd::amend(storage, options));
}

TEST_CASE("fvd: another base is recorded in one sector or refused") {
  auto base = make_raw_disk(empty(1_MiB));
  MemStorage storage(must(create(over_base(1_MiB), base.get())));

  must(fvd::change_backing(storage, "other.qcow2", "qcow2"));

  const ImageInfo info = must(fvd::info(storage));
  CHECK(info.backing_filename == "other.qcow2");
  CHECK(info.backing_format == "qcow2");
  CHECK_FALSE(fvd::change_backing(storage, "", std::nullopt));
  CHECK_FALSE(fvd::change_backing(storage, "other", std::nullopt));
  CHECK_FALSE(fvd::change_backing(storage, std::string(500, 'a'), "raw"));
}

}  // namespace imgfuse::test
