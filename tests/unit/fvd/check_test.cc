// Checking and repairing FVD images.
#include <doctest/doctest.h>

#include "fvd_bytes.h"
#include "support/builders.h"
#include "support/fvd_view.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kChunk = 65536;

/// Eight chunks in use.
MemImage sample(bool journal = true) {
  FvdSpec spec{.size = 4_MiB, .base = true, .base_size = 2_MiB + 512};
  spec.own.compact = true;
  spec.own.chunk_size = kChunk;
  spec.own.block_size = 4096;
  spec.own.storage_grow_unit = 1_MiB;
  spec.own.journal = journal;
  if (journal) spec.own.journal_size = 16384;
  const auto memory = std::make_shared<MemStorage>(make_fvd(spec));
  auto disk = must(open_fvd(memory));
  must(disk->write(GuestOffset(0), pattern(8 * kChunk, 1)));
  must(disk->close());
  return memory->image();
}

struct Checked {
  CheckReport report;
  std::vector<std::string> said;
  MemImage image;
};

Checked check(const MemImage& image, Repair repair = Repair::none) {
  MemStorage storage(image);
  Checked checked;
  checked.report = must(fvd::check(storage, repair, [&](const std::string& line) { checked.said.push_back(line); }));
  checked.image = storage.image();
  return checked;
}

std::vector<std::byte> content(const MemImage& image) {
  auto disk = must(open_fvd(std::make_shared<MemStorage>(image), {.read_only = true}));
  std::vector<std::byte> bytes = read_all(*disk, GuestOffset(0), disk->size());
  must(disk->close());
  return bytes;
}

}  // namespace

TEST_CASE("fvd check: a sound image is sound, and the numbers are its own") {
  const Checked checked = check(sample());

  CHECK(checked.report.clean());
  CHECK(checked.said.empty());
  CHECK(checked.report.total_clusters == 64);
  CHECK(checked.report.allocated_clusters == 8);
}

TEST_CASE("fvd check: leaked chunks that hold data are counted, and emptied by a repair") {
  MemImage image = sample();
  poke_le<uint32_t>(image, table_of(image) + 3 * 4, 0xFFFFFFFF);

  CHECK(check(image).report.leaks == 1);
  CHECK(check(image).report.corruptions == 0);
  const Checked repaired = check(image, Repair::leaks);
  CHECK(repaired.report.leaks_fixed == 1);
  CHECK(repaired.report.leaks == 0);
  CHECK(check(repaired.image).report.clean());
  CHECK(content(repaired.image) == content(image));
}

TEST_CASE("fvd check: bits behind the last block are counted, and cleared by a repair") {
  MemImage image = sample();
  const uint64_t last = peek_le<uint64_t>(image, kBitmapOffset) + 513 / 8;
  poke_le<uint8_t>(image, last, static_cast<uint8_t>(peek_le<uint8_t>(image, last) | 0x80));

  CHECK(check(image).report.leaks == 1);
  const Checked repaired = check(image, Repair::leaks);
  CHECK(repaired.report.leaks_fixed == 1);
  CHECK(check(repaired.image).report.clean());
}

TEST_CASE("fvd check: two entries for one chunk are corruption that no repair decides") {
  MemImage image = sample();
  poke_le<uint32_t>(image, table_of(image) + 40 * 4, 5);

  for (const Repair repair : {Repair::none, Repair::leaks, Repair::all}) {
    const Checked checked = check(image, repair);
    CHECK(checked.report.corruptions == 1);
    REQUIRE(!checked.said.empty());
    CHECK(checked.said.front() == "table entries 5 and 40 claim chunk 5");
  }
}

TEST_CASE("fvd check: an entry past the end of the file is corruption, and empty after a full repair") {
  MemImage image = sample();
  poke_le<uint32_t>(image, table_of(image) + 40 * 4, 5000);

  CHECK(check(image).report.corruptions == 1);
  CHECK(check(image, Repair::leaks).report.corruptions == 1);
  const Checked repaired = check(image, Repair::all);
  CHECK(repaired.report.corruptions_fixed == 1);
  CHECK(check(repaired.image).report.clean());
  must(must(open_fvd(std::make_shared<MemStorage>(repaired.image)))->close());
}

TEST_CASE("fvd check: a crashed image is sound, and a repair brings its journal in") {
  const MemImage image = sample();
  const auto memory = std::make_shared<MemStorage>(image);
  auto disk = must(open_fvd(memory));
  must(disk->write(GuestOffset(3_MiB), pattern(100000, 4)));
  must(disk->flush());
  const MemImage crashed = memory->image();
  must(disk->close());

  CHECK(check(crashed).report.clean());
  const Checked repaired = check(crashed, Repair::leaks);
  CHECK(peek_le<uint32_t>(repaired.image, kClean) == 1);
  CHECK(FvdView::parse(repaired.image)->used_journal_sectors == 0);
  CHECK(content(repaired.image) == content(crashed));
}

TEST_CASE("fvd check: an unclean image without a journal is taken as it is by a full repair only") {
  MemImage image = sample(false);
  poke_le<uint32_t>(image, kClean, 0);

  CHECK(check(image).report.corruptions == 1);
  CHECK(peek_le<uint32_t>(check(image, Repair::leaks).image, kClean) == 0);
  const Checked repaired = check(image, Repair::all);
  CHECK(repaired.report.corruptions_fixed == 1);
  CHECK(peek_le<uint32_t>(repaired.image, kClean) == 1);
}

TEST_CASE("fvd check: a damaged journal is corruption, and is left alone") {
  MemImage image = sample();
  poke_le<uint32_t>(image, kClean, 0);
  poke_le<uint32_t>(image, journal_of(image), kTableType);
  poke_le<uint32_t>(image, journal_of(image) + 8, 1000);

  const Checked checked = check(image, Repair::all);

  CHECK(checked.report.corruptions == 1);
  CHECK(checked.report.check_errors == 1);
  CHECK(peek_le<uint32_t>(checked.image, journal_of(image)) == kTableType);
}

}  // namespace imgfuse::test
