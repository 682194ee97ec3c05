// Interleavings on FVD disks: a call is held in the storage, another request starts, and the test proves who waits.
#include <doctest/doctest.h>

#include "fvd_bytes.h"
#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/fvd_view.h"
#include "support/gate_storage.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kBlock = 65536;

struct Gated {
  explicit Gated(bool compact = true, uint64_t journal = 65536) {
    FvdSpec spec{.size = 8_MiB, .base = true, .base_size = 8_MiB};
    spec.own.compact = compact;
    spec.own.block_size = kBlock;
    spec.own.chunk_size = 2 * kBlock;
    spec.own.journal_size = journal;
    base.write(0, pattern(8_MiB, 5));
    memory = std::make_shared<MemStorage>(make_fvd(spec));
    gates = std::make_shared<GateStorage>(memory);
    disk = must(open_fvd(gates, {.backing = base}));
  }
  std::vector<std::byte> read(uint64_t offset, size_t length) { return read_all(*disk, GuestOffset(offset), length); }
  std::vector<std::byte> below(uint64_t offset, size_t length) const {
    std::vector<std::byte> bytes(length);
    base.read(offset, bytes);
    return bytes;
  }
  void close() {
    must(disk->close());
    CHECK(FvdView::parse(memory->image())->find_corruption() == "");
  }

  MemImage base;
  std::shared_ptr<MemStorage> memory;
  std::shared_ptr<GateStorage> gates;
  std::unique_ptr<Disk> disk;
};

std::function<bool(HostRange)> of_length(uint64_t length) {
  return [length](HostRange range) { return range.length == length; };
}

}  // namespace

TEST_CASE("fvd: a fill from the base does not overwrite what another write brought into the block") {
  // The original loses these bytes: a whole-block write took no lock against the fill of a partial one.
  for (const bool compact : {false, true}) {
    Gated d(compact);
    const auto gate = d.gates->hold(Call::write, Point::before, of_length(kBlock));
    auto whole = in_background([&] { return d.disk->write(GuestOffset(kBlock), pattern(kBlock, 1)); });
    gate->wait_for_arrival();

    auto part = in_background([&] { return d.disk->write(GuestOffset(kBlock + 1000), pattern(500, 2)); });
    CHECK(waits(part));

    gate->open();
    must(whole.get());
    must(part.get());
    std::vector<std::byte> wanted = pattern(kBlock, 1);
    const std::vector<std::byte> later = pattern(500, 2);
    std::copy(later.begin(), later.end(), wanted.begin() + 1000);
    CHECK(d.read(kBlock, kBlock) == wanted);
    d.close();
  }
}

TEST_CASE("fvd: a guest write waits for a copy of its block, and stays") {
  Gated d;
  const auto gate = d.gates->hold(Call::write, Point::before, of_length(kBlock));
  auto copy = in_background([&] { return d.disk->populate({GuestOffset(4 * kBlock), kBlock}); });
  gate->wait_for_arrival();

  auto write = in_background([&] { return d.disk->write(GuestOffset(4 * kBlock + 512), pattern(512, 1)); });
  CHECK(waits(write));
  must(d.disk->write(GuestOffset(8 * kBlock), pattern(512, 2)));  // elsewhere: nobody waits

  gate->open();
  must(copy.get());
  must(write.get());
  CHECK(d.read(4 * kBlock + 512, 512) == pattern(512, 1));
  CHECK(d.read(4 * kBlock, 512) == d.below(4 * kBlock, 512));
  d.close();
}

TEST_CASE("fvd: a copy waits for a guest write to its block, and leaves it alone") {
  Gated d;
  const auto gate = d.gates->hold(Call::write, Point::before, of_length(kBlock));
  auto write = in_background([&] { return d.disk->write(GuestOffset(4 * kBlock + 512), pattern(512, 1)); });
  gate->wait_for_arrival();

  auto copy = in_background([&] { return d.disk->populate({GuestOffset(4 * kBlock), 2 * kBlock}); });
  CHECK(waits(copy));

  gate->open();
  must(write.get());
  must(copy.get());
  CHECK(d.read(4 * kBlock + 512, 512) == pattern(512, 1));
  d.close();
}

TEST_CASE("fvd: two copies of one block store it once") {
  Gated d;
  const auto gate = d.gates->hold(Call::write, Point::before, of_length(kBlock));
  auto first = in_background([&] { return d.disk->populate({GuestOffset(4 * kBlock), kBlock}); });
  gate->wait_for_arrival();
  auto second = in_background([&] { return d.disk->populate({GuestOffset(4 * kBlock), kBlock}); });
  CHECK(waits(second));
  d.memory->counts().reset();

  gate->open();
  must(first.get());
  must(second.get());

  CHECK(d.memory->counts().writes == 1);
  d.close();
}

TEST_CASE("fvd: readers of a block that is being brought in wait, readers of others do not") {
  Gated d;
  const auto gate = d.gates->hold(Call::write, Point::after, of_length(kBlock));
  auto write = in_background([&] { return d.disk->write(GuestOffset(6 * kBlock), pattern(kBlock, 1)); });
  gate->wait_for_arrival();

  auto read = in_background([&] { return d.read(6 * kBlock, 4096); });
  CHECK(waits(read));
  CHECK(d.read(0, 4096) == d.below(0, 4096));

  gate->open();
  must(write.get());
  CHECK(read.get() == d.read(6 * kBlock, 4096));
  d.close();
}

TEST_CASE("fvd: writers go on while a checkpoint writes, and what they write is in the next flush") {
  Gated d(true, 4096);
  for (uint64_t i = 0; i < 7; ++i) {
    must(d.disk->write(GuestOffset(i * 4 * kBlock), pattern(512, i)));
    must(d.disk->flush());
  }
  must(d.disk->write(GuestOffset(40 * kBlock), pattern(512, 40)));
  must(d.disk->write(GuestOffset(44 * kBlock), pattern(512, 44)));
  const uint64_t table = table_of(d.memory->image());
  const auto gate =
      d.gates->hold(Call::write, Point::before, [table](HostRange range) { return range.begin.bytes() == table; });
  auto flush = in_background([&] { return d.disk->flush(); });  // the journal is full
  gate->wait_for_arrival();

  must(d.disk->write(GuestOffset(60 * kBlock), pattern(512, 60)));
  CHECK(d.read(60 * kBlock, 512) == pattern(512, 60));

  gate->open();
  must(flush.get());
  must(d.disk->flush());
  auto after = must(open_fvd(std::make_shared<MemStorage>(d.memory->image()), {.backing = d.base}));
  CHECK(read_all(*after, GuestOffset(60 * kBlock), 512) == pattern(512, 60));
  CHECK(read_all(*after, GuestOffset(44 * kBlock), 512) == pattern(512, 44));
  must(after->close());
  d.close();
}

TEST_CASE("fvd: a write that comes during a flush is not in it, and not lost") {
  Gated d;
  must(d.disk->write(GuestOffset(0), pattern(512, 1)));
  const uint64_t journal = journal_of(d.memory->image());
  const auto gate = d.gates->hold(Call::write, Point::before, [journal](HostRange range) {
    return range.begin.bytes() == journal && range.length == 512;
  });
  auto flush = in_background([&] { return d.disk->flush(); });
  gate->wait_for_arrival();
  must(d.disk->write(GuestOffset(10 * kBlock), pattern(512, 2)));
  gate->open();
  must(flush.get());
  const MemImage between = d.memory->image();

  auto after = must(open_fvd(std::make_shared<MemStorage>(between), {.backing = d.base}));
  CHECK(read_all(*after, GuestOffset(0), 512) == pattern(512, 1));
  CHECK(read_all(*after, GuestOffset(10 * kBlock), 512) == d.below(10 * kBlock, 512));
  must(after->close());
  must(d.disk->flush());
  auto later = must(open_fvd(std::make_shared<MemStorage>(d.memory->image()), {.backing = d.base}));
  CHECK(read_all(*later, GuestOffset(10 * kBlock), 512) == pattern(512, 2));
  must(later->close());
  d.close();
}

}  // namespace imgfuse::test
