// What requests to FVD disks cost, in host calls.
#include <doctest/doctest.h>

#include <chrono>
#include <thread>

#include "base/math.h"
#include "fvd_bytes.h"
#include "support/builders.h"
#include "support/fvd_view.h"

namespace imgfuse::test {
namespace {

struct Counted {
  Counted(bool compact, bool with_base, std::optional<uint64_t> journal = 1_MiB) {
    FvdSpec spec{.size = 64_MiB, .base = with_base, .base_size = with_base ? 64_MiB : 0};
    spec.own.compact = compact;
    spec.own.chunk_size = 65536;
    spec.own.storage_grow_unit = 64_MiB;
    if (with_base) spec.own.block_size = 4096;
    spec.own.journal = journal.has_value();
    spec.own.journal_size = journal;
    memory = std::make_shared<MemStorage>(make_fvd(spec));
    disk = must(open_fvd(memory));
    must(disk->write(GuestOffset(0), pattern(1_MiB)));
    must(disk->flush());
    memory->counts().reset();
  }
  ~Counted() { must(disk->close()); }
  uint64_t journal_sectors() const { return FvdView::parse(memory->image())->used_journal_sectors; }

  std::shared_ptr<MemStorage> memory;
  std::unique_ptr<Disk> disk;
};

}  // namespace

TEST_CASE("fvd: a write to what is in the image is one host write, and its flush one host flush") {
  for (const bool compact : {false, true})
    for (const bool base : {false, true}) {
      Counted c(compact, base);

      for (uint64_t i = 0; i < 50; ++i) {
        must(c.disk->write(GuestOffset(i * 20480), pattern(4096, i)));
        must(c.disk->flush());
      }

      CHECK(c.memory->counts().writes == 50);
      CHECK(c.memory->counts().bytes_written == 50 * 4096);
      CHECK(c.memory->counts().flushes == 50);
      CHECK(c.memory->counts().reads == 0);
    }
}

TEST_CASE("fvd: a flush costs two host flushes at most, also when something was allocated") {
  for (const bool compact : {false, true})
    for (const bool base : {false, true}) {
      Counted c(compact, base);
      for (uint64_t i = 0; i < 50; ++i) {
        c.memory->counts().reset();
        must(c.disk->write(GuestOffset(2_MiB + i * 128_KiB), pattern(4096, i)));
        must(c.disk->flush());
        CHECK(c.memory->counts().flushes <= 2);
      }
    }
}

TEST_CASE("fvd: with data in a file of their own a flush is one of each file, the first one too") {
  for (const bool base : {false, true}) {
    FvdSpec spec{.size = 64_MiB, .base = base, .base_size = base ? 64_MiB : 0, .data_file = "data.raw"};
    spec.own.compact = true;
    spec.own.chunk_size = 65536;
    spec.own.journal_size = 1_MiB;
    const auto image = std::make_shared<MemStorage>(make_fvd(spec));
    const auto data = std::make_shared<MemStorage>();
    auto disk = must(open_fvd(image, {.data = data}));
    if (base) must(disk->populate({GuestOffset(0), 128_KiB}));
    for (uint64_t i = 0; i < 20; ++i) {
      must(disk->write(GuestOffset(i * 65536), pattern(4096, i)));
      image->counts().reset();
      data->counts().reset();
      must(disk->flush());
      CHECK(data->counts().flushes == 1);
      CHECK(image->counts().flushes <= 1);
    }
    must(disk->close());
  }
}

TEST_CASE("fvd: neighbouring writes between two flushes become one journal record") {
  Counted c(true, true);
  const uint64_t before = c.journal_sectors();

  for (uint64_t i = 0; i < 64; ++i) must(c.disk->write(GuestOffset(8_MiB + i * 4096), pattern(4096, i)));
  must(c.disk->flush());

  CHECK(c.journal_sectors() - before == 1);
}

TEST_CASE("fvd: writes in any order need a journal sector for each stretch they leave") {
  Counted c(true, true);
  const uint64_t before = c.journal_sectors();

  for (const uint64_t block : {9u, 3u, 0u, 1u, 8u, 2u, 30u}) {  // 0-3, 8-9, 30
    must(c.disk->write(GuestOffset(8_MiB + block * 4096), pattern(4096, block)));
  }
  must(c.disk->flush());

  CHECK(c.journal_sectors() - before == 3);
}

TEST_CASE("fvd: chunks without a base share journal sectors, forty stretches to one") {
  Counted c(true, false);
  const uint64_t before = c.journal_sectors();

  for (uint64_t i = 0; i < 32; ++i) must(c.disk->write(GuestOffset(8_MiB + i * 3 * 65536), pattern(4096, i)));
  must(c.disk->flush());

  // A record of one entry has 16 bytes: 32 of them fill a sector.
  CHECK(c.journal_sectors() - before == 1);
}

TEST_CASE("fvd: copies from the base cost no flush and no metadata") {
  Counted c(true, true);
  const uint64_t before = c.journal_sectors();
  const MemImage image = c.memory->image();
  c.memory->counts().reset();

  must(c.disk->populate({GuestOffset(32_MiB), 1_MiB}));

  CHECK(c.memory->counts().flushes == 0);
  CHECK(c.memory->counts().bytes_written == 1_MiB);
  CHECK(c.journal_sectors() == before);
  std::vector<std::byte> then(peek_le<uint64_t>(image, kMetadataSize)), now(then.size());
  image.read(0, then);
  c.memory->image().read(0, now);
  CHECK(then == now);
}

TEST_CASE("fvd: threads that flush at the same time share host flushes") {
  Counted c(true, false);
  std::vector<std::thread> threads;
  std::atomic<uint64_t> good = 0;
  for (uint64_t t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (uint64_t i = 0; i < 25; ++i)
        if (c.disk->write(GuestOffset(t * 16_MiB + i * 65536), pattern(4096, i)) && c.disk->flush()) ++good;
    });
  for (std::thread& thread : threads) thread.join();

  CHECK(good == 100);
  CHECK(c.memory->counts().flushes <= 200);
}

TEST_CASE("fvd: opening a disk of 10 TiB reads its table and little else") {
  FvdSpec spec{.size = uint64_t{10} << 40};
  spec.own.compact = true;
  spec.own.chunk_size = 8_MiB;
  MemImage image = make_fvd(spec);
  const uint64_t table = spec.size / spec.own.chunk_size * 4;
  const auto storage = std::make_shared<MemStorage>(image);

  auto disk = must(open_fvd(storage));

  CHECK(storage->counts().bytes_read <= table + 64_KiB);
  must(disk->write(GuestOffset(spec.size - 4096), pattern(4096)));
  must(disk->close());
}

}  // namespace imgfuse::test
