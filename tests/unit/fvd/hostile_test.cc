// Headers, tables, bitmaps and journals made to mislead: a clear error or correct data, nothing written where it is an
// error, and no more time or memory than the file's size justifies.
#include <doctest/doctest.h>

#include <functional>
#include <string>
#include <vector>

#include "fvd_bytes.h"
#include "support/builders.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kChunk = 65536, kDisk = 4_MiB;

/// Compact, with a base, unclean, with a record of each kind in its journal.
MemImage sample() {
  FvdSpec spec{.size = kDisk, .base = true, .base_size = kDisk};
  spec.own.compact = true;
  spec.own.chunk_size = kChunk;
  spec.own.block_size = 4096;
  spec.own.journal_size = 16384;
  spec.own.storage_grow_unit = 1_MiB;
  const auto memory = std::make_shared<MemStorage>(make_fvd(spec));
  auto disk = must(open_fvd(memory));
  must(disk->write(GuestOffset(0), pattern(kChunk, 1)));
  must(disk->flush());
  must(disk->write(GuestOffset(1_MiB), pattern(4096, 2)));
  must(disk->flush());
  const MemImage crashed = memory->image();
  must(disk->close());
  return crashed;
}

/// The same without anything but a table.
MemImage plain_sample() {
  FvdSpec spec{.size = kDisk};
  spec.own.compact = true;
  spec.own.chunk_size = kChunk;
  spec.own.journal_size = 16384;
  const auto memory = std::make_shared<MemStorage>(make_fvd(spec));
  auto disk = must(open_fvd(memory));
  must(disk->write(GuestOffset(0), pattern(2 * kChunk, 1)));
  must(disk->close());
  return memory->image();
}

enum class Outcome {
  refused,    ///< by everybody
  read_only,  ///< refused for writing only
  as_it_was,  ///< presented as if nothing had been done
};

struct Attack {
  std::string name;
  std::function<void(MemImage&)> make;
  Outcome outcome = Outcome::refused;
  std::string says;  ///< a part of the message
};

template <class T>
std::function<void(MemImage&)> field(uint64_t offset, T value) {
  return [=](MemImage& image) { poke_le<T>(image, offset, value); };
}

std::function<void(MemImage&)> fill(uint64_t offset, uint64_t length, char value) {
  return [=](MemImage& image) { image.write(offset, std::vector<std::byte>(length, std::byte(value))); };
}

/// A journal sector of 32-bit words.
std::function<void(MemImage&)> journal(uint64_t sector, std::vector<uint32_t> words, uint64_t at = 0) {
  return [=](MemImage& image) {
    for (size_t i = 0; i < words.size(); ++i)
      poke_le<uint32_t>(image, journal_of(image) + sector * 512 + at + i * 4, words[i]);
  };
}

std::function<void(MemImage&)> entry(uint64_t index, uint32_t value) {
  return [=](MemImage& image) { poke_le<uint32_t>(image, table_of(image) + index * 4, value); };
}

const uint64_t kHuge = uint64_t{1} << 63;

std::vector<Attack> attacks() {
  using enum Outcome;
  return {
      {"another magic", field<uint32_t>(0, 0x12345678), refused, "magic"},
      {"the magic of the later draft", field<uint32_t>(0, 0x00445646), refused, "later FVD draft"},
      {"a field more before the journal's: the layout of February 2011",
       [](MemImage& image) {
         std::array<std::byte, 48> fields;
         image.read(kJournalOffset, fields);
         image.write(kJournalOffset + 4, fields);
         poke_le<uint32_t>(image, kJournalOffset, 1);
       },
       refused, "February 2011"},
      {"version 0", field<uint32_t>(4, 0), refused, "version 0"},
      {"version 2", field<uint32_t>(4, 2), refused, "version 2"},
      {"a size that ends inside a sector", field<uint64_t>(kSize, kDisk + 1), refused, "virtual disk size"},
      {"a negative size", field<uint64_t>(kSize, ~uint64_t{0} << 9), refused, "virtual disk size"},
      {"a size of 2^63", field<uint64_t>(kSize, kHuge), refused, "virtual disk size"},
      {"a size of 2^61", field<uint64_t>(kSize, uint64_t{1} << 61), refused, "chunks are more than"},
      {"a size that needs a longer table", field<uint64_t>(kSize, uint64_t{1} << 40), refused, "table"},
      {"metadata that end before they begin", field<uint64_t>(kMetadataSize, 0), refused, "metadata"},
      {"metadata of one sector", field<uint64_t>(kMetadataSize, 512), refused, "metadata"},
      {"negative metadata", field<uint64_t>(kMetadataSize, ~uint64_t{0}), refused, "metadata size"},
      {"metadata of 2^62", field<uint64_t>(kMetadataSize, uint64_t{1} << 62), refused, "metadata size"},
      {"a base without a name", fill(kBaseName, 1024, '\0'), refused, "names none"},
      {"a base's name without an end", fill(kBaseName, 1024, 'a'), refused, "no end"},
      {"a base's format without an end", fill(kBaseFormat, 16, 'a'), refused, "no end"},
      {"a base size that ends inside a sector", field<uint64_t>(kBaseSize, 1000), refused, "base image's size"},
      {"a negative base size", field<uint64_t>(kBaseSize, kHuge), refused, "base image's size"},
      {"a base of more than the disk", field<uint64_t>(kBaseSize, uint64_t{1} << 40), as_it_was, ""},
      {"a base of no size", field<uint64_t>(kBaseSize, 0), as_it_was, ""},
      {"a block size of 0", field<uint32_t>(kBlockSize, 0), refused, "block size 0"},
      {"a block size of 1", field<uint32_t>(kBlockSize, 1), refused, "block size 1"},
      {"a block size of 513", field<uint32_t>(kBlockSize, 513), refused, "block size 513"},
      {"a negative block size", field<uint32_t>(kBlockSize, 0xFFFFFE00), refused, "block size"},
      {"a block size that needs a longer bitmap",
       [](MemImage& image) {
         poke_le<uint32_t>(image, kBlockSize, 512);
         poke_le<uint64_t>(image, kBitmapSize, 512);
       },
       refused, "bitmap"},
      {"a bitmap over the header", field<uint64_t>(kBitmapOffset, 4096), refused, "overlaps"},
      {"a bitmap in the header's first bytes", field<uint64_t>(kBitmapOffset, 0), refused, "overlaps"},
      {"a bitmap behind the metadata", field<uint64_t>(kBitmapOffset, 1_MiB), refused, "not inside the metadata"},
      {"a bitmap at the end of all numbers", field<uint64_t>(kBitmapOffset, ~uint64_t{0}), refused, "metadata"},
      {"a bitmap of no size", field<uint64_t>(kBitmapSize, 0), refused, "bitmap has 0 bytes"},
      {"a bitmap of a negative size", field<uint64_t>(kBitmapSize, kHuge), refused, "bitmap's size"},
      {"a data file's name without an end", fill(kDataName, 1024, 'a'), refused, "no end"},
      {"a data file that nobody opens", fill(kDataName, 4, 'a'), refused, "data file"},
      {"a data file's format without an end", fill(kDataFormat, 16, 'a'), refused, "no end"},
      {"a chunk size of 0", field<uint64_t>(kChunkSize, 0), refused, "chunk size 0"},
      {"a chunk size of 512", field<uint64_t>(kChunkSize, 512), refused, "chunk size 512"},
      {"a chunk size of 4097", field<uint64_t>(kChunkSize, 4097), refused, "chunk size 4097"},
      {"a negative chunk size", field<uint64_t>(kChunkSize, ~uint64_t{4095}), refused, "chunk size"},
      {"a chunk size that needs a longer table",
       [](MemImage& image) {
         poke_le<uint64_t>(image, kChunkSize, 4096);
         poke_le<uint64_t>(image, kSize, 2 * kDisk);
       },
       refused, "overlaps"},
      {"a table over the header", field<uint64_t>(kTableOffset, 4096), refused, "overlaps"},
      {"a table over the bitmap", field<uint64_t>(kTableOffset, 8192), refused, "overlaps"},
      {"a table behind the metadata", field<uint64_t>(kTableOffset, uint64_t{1} << 61), refused, "metadata"},
      {"a table at the end of all numbers", field<uint64_t>(kTableOffset, ~uint64_t{0} - 8), refused, "metadata"},
      {"a negative grow unit", field<uint64_t>(kGrowUnit, kHuge), refused, "storage_grow_unit"},
      {"a grow unit of 2^61", field<uint64_t>(kGrowUnit, uint64_t{1} << 61), as_it_was, ""},
      {"a grow unit of 0", field<uint64_t>(kGrowUnit, 0), as_it_was, ""},
      {"a command without an end", fill(kCommand, 2048, 'a'), refused, "no end"},
      {"a command", fill(kCommand, 6, 'a'), as_it_was, ""},
      {"a journal over the header", field<uint64_t>(kJournalOffset, 0), refused, "overlaps"},
      {"a journal over the table", [](MemImage& image) { poke_le<uint64_t>(image, kJournalOffset, table_of(image)); },
       refused, "overlaps"},
      {"a journal of a negative size", field<uint64_t>(kJournalSize, kHuge), refused, "journal size"},
      {"a journal longer than the metadata", field<uint64_t>(kJournalSize, 1_GiB), refused, "metadata"},
      {"a journal shorter than a sector: none", field<uint64_t>(kJournalSize, 100), read_only, "no journal"},
      {"a table record that runs past its sector", journal(2, {kTableType, 0, 126}), refused, "runs past its end"},
      {"a table record of 2^32 entries", journal(2, {kTableType, 0, 0xFFFFFFFF}), refused, "runs past its end"},
      {"a table record cut off by the sector's end", journal(2, {kTableType}, 508), as_it_was, ""},
      {"a table record behind others that leave no room",
       [](MemImage& image) {
         journal(2, {kTableType, 0, 61})(image);
         fill(journal_of(image) + 1024 + 12, 244, '\xff')(image);
         journal(2, {kTableType, 0, 60}, 256)(image);
         fill(journal_of(image) + 1024 + 268, 240, '\xff')(image);
         journal(2, {kTableType}, 508)(image);
       },
       refused, "table record at byte 508 runs past its end"},
      {"a table record of chunks that the disk does not have", journal(2, {kTableType, 64, 1, 5}), refused,
       "the disk has 64 chunks"},
      {"a table record at the end of all numbers", journal(2, {kTableType, 0xFFFFFFFF, 1, 5}), refused, "chunks"},
      {"a table record of nothing", journal(2, {kTableType, 64, 0}), as_it_was, ""},
      {"a table record of empty entries", journal(2, {kTableType, 0, 1, 0xFFFFFFFF}), as_it_was, ""},
      {"a record that claims another's chunk", journal(2, {kTableType, 5, 1, 0x80000000}), refused, "claim chunk 0"},
      {"a record that claims a chunk past the end", journal(2, {kTableType, 5, 1, 0x8000FFFF}), read_only,
       "past the end"},
      {"a bitmap record at the sector's end",
       [](MemImage& image) {
         journal(2, {kTableType, 0, 61})(image);
         fill(journal_of(image) + 1024 + 12, 244, '\xff')(image);
         journal(2, {kTableType, 0, 59}, 256)(image);
         fill(journal_of(image) + 1024 + 268, 236, '\xff')(image);
         journal(2, {kBitmapType, 1}, 504)(image);
       },
       refused, "bitmap record at byte 504 runs past its end"},
      {"a bitmap record past the disk", journal(2, {kBitmapType, 8, 8192, 0}), refused, "sectors"},
      {"a bitmap record that leaves the disk", journal(2, {kBitmapType, 9, 8184, 0}), refused, "sectors"},
      {"a bitmap record at the end of all numbers", journal(2, {kBitmapType, 8, 0xFFFFFFFF, 0xFFFFFFFF}), refused,
       "sectors"},
      {"a bitmap record of nothing", journal(2, {kBitmapType, 0, 0, 0}), as_it_was, ""},
      {"a record behind a bitmap record", journal(2, {kBitmapType, 8, 0, 0, kTableType, 0, 1, 5}), as_it_was, ""},
      {"an unknown record", journal(2, {0xDEADBEEF, 1, 2, 3}), as_it_was, ""},
      {"two entries for one chunk",
       [](MemImage& image) {
         entry(10, 7)(image);
         entry(11, 7)(image);
       },
       refused, "claim chunk 7"},
      {"an entry past the end of the file", entry(10, 0x7FFFFFFE), read_only, "past the end"},
      {"an entry that is nothing but dirty", entry(10, 0x80000000), refused, "claim chunk 0"},
      {"an entry behind 2^63",
       [](MemImage& image) {
         poke_le<uint64_t>(image, kChunkSize, uint64_t{1} << 40);
         entry(0, 0x7FFFFFFE)(image);
         poke_le<uint64_t>(image, journal_of(image), 0);
         poke_le<uint64_t>(image, journal_of(image) + 512, 0);
       },
       refused, "no such place"},
      {"a table of zeros", [](MemImage& image) { fill(table_of(image), 256, '\0')(image); }, refused, "claim chunk 0"},
      {"a file that ends inside its header", [](MemImage& image) { image.resize(4000); }, refused, "header"},
      {"a file that ends inside its table", [](MemImage& image) { image.resize(table_of(image) + 100); }, refused,
       "past the end of the file"},
      {"a file that ends inside its journal", [](MemImage& image) { image.resize(journal_of(image) + 100); }, refused,
       "past the end of the file"},
      {"a file that ends where data begin",
       [](MemImage& image) { image.resize(peek_le<uint64_t>(image, kMetadataSize)); }, read_only, "past the end"},
  };
}

bool equal(const MemImage& a, const MemImage& b) {
  if (a.size() != b.size()) return false;
  std::vector<std::byte> left(1_MiB), right(1_MiB);
  for (uint64_t at = 0; at < a.size(); at += left.size()) {
    a.read(at, left);
    b.read(at, right);
    if (left != right) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("fvd hostile: an image that misleads is refused in words, or presented as it is") {
  const MemImage good = sample();
  CHECK(attacks().size() >= 70);
  for (const Attack& attack : attacks()) {
    CAPTURE(attack.name);
    MemImage image = good;
    attack.make(image);
    for (const bool read_only : {true, false}) {
      CAPTURE(read_only);
      const auto storage = std::make_shared<MemStorage>(image, !read_only);
      auto disk = open_fvd(storage, {.read_only = read_only});
      const bool refused = attack.outcome == Outcome::refused || (attack.outcome == Outcome::read_only && !read_only);
      if (refused) {
        CHECK_FALSE(disk);
        if (disk) must((*disk)->close());
        if (!disk) CHECK(disk.error().text().find(attack.says) != std::string::npos);
        if (!disk) CHECK(disk.error().text().find('\n') == std::string::npos);
        CHECK(equal(storage->image(), image));
        continue;
      }
      if (!disk) FAIL_CHECK(disk.error().text());
      if (!disk) continue;
      std::vector<std::byte> everything((*disk)->size());
      CHECK((*disk)->read(GuestOffset(0), everything));
      if (attack.outcome == Outcome::as_it_was)
        CHECK(std::vector<std::byte>(everything.begin(), everything.begin() + kChunk) == pattern(kChunk, 1));
      must((*disk)->close());
      if (read_only) CHECK(equal(storage->image(), image));
    }
    for (const Repair repair : {Repair::none, Repair::leaks, Repair::all}) {
      MemStorage storage(image);
      (void)fvd::check(storage, repair, [](const std::string&) {});  // whatever it says, it ends
      if (repair == Repair::none) CHECK(equal(storage.image(), image));
    }
    MemStorage storage(image);
    (void)fvd::info(storage);
  }
}

TEST_CASE("fvd hostile: any single word of the metadata set to extremes does no harm") {
  const MemImage good = sample();
  const uint64_t end = peek_le<uint64_t>(good, kMetadataSize);
  Rng rng(base_seed());
  for (uint64_t round = 0; round < from_environment("IMG_RUNS", 600); ++round) {
    MemImage image = good;
    const uint64_t at = rng.one_in(2) ? rng.below(4336 / 4) * 4 : rng.below(end / 4) * 4;
    const uint32_t values[] = {0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, static_cast<uint32_t>(rng.next())};
    const uint32_t value = values[rng.below(6)];
    INFO("IMG_SEED=" << base_seed() << ", word at " << at << " is " << value);
    poke_le<uint32_t>(image, at, value);
    const auto storage = std::make_shared<MemStorage>(image);
    auto disk = open_fvd(storage);
    if (!disk) {
      CHECK(equal(storage->image(), image));
      continue;
    }
    std::vector<std::byte> bytes(65536);
    if ((*disk)->size() >= bytes.size()) {
      CHECK((*disk)->read(GuestOffset(0), bytes));
      CHECK((*disk)->write(GuestOffset(4096), ConstBytes(bytes).first(512)));
    }
    CHECK((*disk)->close());
  }
}

TEST_CASE("fvd hostile: a journal of a terabyte of holes is read in no time") {
  MemImage image = plain_sample();
  const uint64_t terabyte = uint64_t{1} << 40;
  poke_le<uint64_t>(image, kJournalSize, terabyte);
  poke_le<uint64_t>(image, kMetadataSize, journal_of(image) + terabyte);
  poke_le<uint32_t>(image, kClean, 0);
  for (const uint64_t index : {0, 1}) poke_le<uint32_t>(image, table_of(image) + index * 4, 0xFFFFFFFF);
  image.resize(journal_of(image) + terabyte);
  const auto storage = std::make_shared<MemStorage>(image);

  auto disk = must(open_fvd(storage));
  must(disk->write(GuestOffset(0), pattern(4096)));
  must(disk->close());

  CHECK(storage->counts().bytes_read < 16_MiB);
  CHECK(storage->counts().bytes_written < 16_MiB);
}

TEST_CASE("fvd hostile: entries scattered over all chunk numbers cost what the table costs") {
  FvdSpec spec{.size = 1_GiB};
  spec.own.compact = true;
  spec.own.chunk_size = 4096;
  spec.own.journal_size = 16384;
  MemImage image = make_fvd(spec);
  const uint64_t chunks = 1_GiB / 4096;
  std::vector<le<uint32_t>> entries;
  for (uint64_t i = 0; i < chunks; ++i) entries.emplace_back(static_cast<uint32_t>(i * 8000 + 1));
  image.write(table_of(image), std::as_bytes(std::span(entries)));
  image.resize(peek_le<uint64_t>(image, kMetadataSize) + (chunks * 8000 + 2) * 4096);
  const auto storage = std::make_shared<MemStorage>(image);

  auto disk = must(open_fvd(storage));
  CHECK(disk->allocated() == 1_GiB);
  must(disk->write(GuestOffset(0), pattern(4096)));
  must(disk->close());
}

}  // namespace imgfuse::test
