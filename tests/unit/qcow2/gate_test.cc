// Interleavings: a call is held in the storage, another request starts, and the test proves who waits for whom.
#include <doctest/doctest.h>

#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/gate_storage.h"
#include "support/image_view.h"
#include "support/order_storage.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kCluster = 65536;

/// A disk with a gate in front of its watched storage. The first guest MiB has a table and data, and is flushed.
struct GatedDisk {
  explicit GatedDisk(const MemImage& image, const OpenSpec& spec = {}) {
    memory = std::make_shared<MemStorage>(image);
    gates = std::make_shared<GateStorage>(std::make_shared<OrderStorage>(memory));
    disk = must(open_image(gates, spec));
    for (const size_t half : {size_t{0}, old_data.size() / 2}) {  // by the second flush clusters are counted ahead
      must(disk->write(GuestOffset(half), std::span(old_data).subspan(half, old_data.size() / 2)));
      must(disk->flush());
    }
  }
  /// Closes, and the image must be sound and without leaks.
  void close() {
    must(disk->close());
    CHECK(ImageView::parse(memory->image())->find_corruption() == "");
    const CheckReport report = check_image(memory->image());
    CHECK(report.corruptions == 0);
    CHECK(report.leaks == 0);
  }
  HostOffset host_of(uint64_t guest) {
    const auto extents = must(disk->map({GuestOffset(guest), 512}));
    return extents.at(0).has_host_offset ? extents.at(0).host : HostOffset(0);
  }
  std::vector<std::byte> read(uint64_t guest, size_t length) { return read_all(*disk, GuestOffset(guest), length); }
  std::vector<std::byte> old(uint64_t guest, size_t length) {
    const auto begin = old_data.begin() + static_cast<ptrdiff_t>(guest);
    return {begin, begin + static_cast<ptrdiff_t>(length)};
  }

  const std::vector<std::byte> old_data = pattern(1_MiB, 77);
  std::shared_ptr<MemStorage> memory;
  std::shared_ptr<GateStorage> gates;
  std::unique_ptr<Disk> disk;
};

/// Data writes of the tests have lengths that no table has.
std::function<bool(HostRange)> of_length(uint64_t length) {
  return [length](HostRange range) { return range.length == length; };
}

std::function<bool(HostRange)> at(HostOffset begin) {
  return [begin](HostRange range) { return range.begin == begin; };
}

TEST_CASE_TEMPLATE("two allocating writes to one cluster follow each other, and neither is lost", Kind,
                   IMG_EVERY_KIND) {
  GatedDisk d(Kind::image());
  const auto gate = d.gates->hold(Call::write, Point::before, of_length(3000));
  auto first = in_background([&] { return d.disk->write(GuestOffset(2_MiB), pattern(3000, 1)); });
  gate->wait_for_arrival();

  auto second = in_background([&] { return d.disk->write(GuestOffset(2_MiB + 3000), pattern(5000, 2)); });
  CHECK(waits(second));
  must(d.disk->write(GuestOffset(3_MiB), pattern(5000, 3)));  // another cluster: nobody waits

  gate->open();
  must(first.get());
  must(second.get());
  CHECK(d.read(2_MiB, 3000) == pattern(3000, 1));
  CHECK(d.read(2_MiB + 3000, 5000) == pattern(5000, 2));
  d.close();
}

TEST_CASE_TEMPLATE("readers of a cluster that is being allocated wait, and see the whole write", Kind, IMG_EVERY_KIND) {
  GatedDisk d(Kind::image());
  const auto gate = d.gates->hold(Call::write, Point::after, of_length(3000));
  auto write = in_background([&] { return d.disk->write(GuestOffset(2_MiB), pattern(3000, 1)); });
  gate->wait_for_arrival();

  auto read = in_background([&] { return d.read(2_MiB, 3000); });
  CHECK(waits(read));

  gate->open();
  must(write.get());
  CHECK(read.get() == pattern(3000, 1));
  d.close();
}

TEST_CASE_TEMPLATE("writers share a cluster that they write in place", Kind, IMG_EVERY_KIND) {
  GatedDisk d(Kind::image());
  const auto gate = d.gates->hold(Call::write, Point::before, of_length(3000));
  auto first = in_background([&] { return d.disk->write(GuestOffset(0), pattern(3000, 1)); });
  gate->wait_for_arrival();

  must(d.disk->write(GuestOffset(4096), pattern(512, 2)));  // does not wait
  CHECK(d.read(4096, 512) == pattern(512, 2));

  gate->open();
  must(first.get());
  d.close();
}

TEST_CASE_TEMPLATE("a discard waits for a write in flight to its cluster", Kind, IMG_EVERY_KIND) {
  GatedDisk d(Kind::image());
  const auto gate = d.gates->hold(Call::write, Point::before, of_length(3000));
  auto write = in_background([&] { return d.disk->write(GuestOffset(kCluster), pattern(3000, 1)); });
  gate->wait_for_arrival();

  auto discard = in_background([&] { return d.disk->discard({GuestOffset(kCluster), kCluster}); });
  CHECK(waits(discard));
  must(d.disk->discard({GuestOffset(2 * kCluster), kCluster}));  // another cluster: does not wait

  gate->open();
  must(write.get());
  must(discard.get());
  CHECK(d.read(kCluster, 2 * kCluster) == std::vector<std::byte>(2 * kCluster));
  d.close();
}

TEST_CASE("qcow2: a write to a cluster whose former host cluster is being punched gets another one") {
  GatedDisk d(make_qcow2({}));
  const HostOffset before = d.host_of(kCluster);
  must(d.disk->discard({GuestOffset(kCluster), kCluster}));
  const auto gate = d.gates->hold(Call::discard);
  auto flush = in_background([&] { return d.disk->flush(); });
  gate->wait_for_arrival();

  must(d.disk->write(GuestOffset(kCluster), pattern(3000, 1)));
  CHECK(d.host_of(kCluster) != before);

  gate->open();
  must(flush.get());
  CHECK(d.read(kCluster, 3000) == pattern(3000, 1));
  d.close();
}

TEST_CASE_TEMPLATE("a cluster is not freed under a reader, so that the reader never sees its next owner's data", Kind,
                   IMG_EVERY_KIND) {
  GatedDisk d(Kind::image());
  const HostOffset host = d.host_of(kCluster);
  const auto gate = d.gates->hold(Call::read, Point::before, at(host));
  auto read = in_background([&] { return d.read(kCluster, kCluster); });
  gate->wait_for_arrival();

  auto discard = in_background([&] { return d.disk->discard({GuestOffset(kCluster), kCluster}); });
  CHECK(waits(discard));
  must(d.disk->flush());
  must(d.disk->write(GuestOffset(4_MiB), pattern(kCluster, 1)));
  CHECK(d.host_of(4_MiB) != host);

  gate->open();
  CHECK(read.get() == d.old(kCluster, kCluster));
  must(discard.get());
  d.close();
}

TEST_CASE_TEMPLATE("a flush does not wait for a write in flight, and publishes nothing of it", Kind, IMG_EVERY_KIND) {
  GatedDisk d(Kind::image());
  const auto gate = d.gates->hold(Call::write, Point::before, of_length(3000));
  auto write = in_background([&] { return d.disk->write(GuestOffset(2_MiB), pattern(3000, 1)); });
  gate->wait_for_arrival();

  must(d.disk->flush());
  auto crashed = must(open_image(std::make_shared<MemStorage>(d.memory->image()), {.read_only = true}));
  CHECK(read_all(*crashed, GuestOffset(2_MiB), 3000) == std::vector<std::byte>(3000));

  gate->open();
  must(write.get());
  must(d.disk->flush());
  crashed = must(open_image(std::make_shared<MemStorage>(d.memory->image()), {.read_only = true}));
  CHECK(read_all(*crashed, GuestOffset(2_MiB), 3000) == pattern(3000, 1));
  d.close();
}

TEST_CASE("qcow2: a cluster discarded during a flush is not freed by that flush") {
  GatedDisk d(make_qcow2({}));
  const HostOffset host = d.host_of(kCluster);
  must(d.disk->write(GuestOffset(2_MiB), pattern(3000, 1)));
  const auto gate = d.gates->hold(Call::flush);
  auto flush = in_background([&] { return d.disk->flush(); });
  gate->wait_for_arrival();

  must(d.disk->discard({GuestOffset(kCluster), kCluster}));
  must(d.disk->write(GuestOffset(3_MiB), pattern(3000, 2)));
  CHECK(d.host_of(3_MiB) != host);
  gate->open();
  must(flush.get());
  must(d.disk->write(GuestOffset(4_MiB), pattern(3000, 3)));

  CHECK(d.host_of(4_MiB) != host);
  must(d.disk->flush());
  must(d.disk->write(GuestOffset(5_MiB), pattern(3000, 4)));
  CHECK(d.host_of(5_MiB) == host);
  d.close();
}

TEST_CASE_TEMPLATE("a write that is linked during a flush is published by the next one, whole", Kind, IMG_EVERY_KIND) {
  GatedDisk d(Kind::image());
  must(d.disk->write(GuestOffset(2_MiB), pattern(3000, 1)));
  const auto gate = d.gates->hold(Call::flush, Point::after);  // the first barrier is done
  auto flush = in_background([&] { return d.disk->flush(); });
  gate->wait_for_arrival();

  must(d.disk->write(GuestOffset(2_MiB + kCluster), pattern(3000, 2)));  // same table

  gate->open();
  must(flush.get());  // the watched storage would stop an entry without a durable count
  auto crashed = must(open_image(std::make_shared<MemStorage>(d.memory->image()), {.read_only = true}));
  CHECK(read_all(*crashed, GuestOffset(2_MiB), 3000) == pattern(3000, 1));
  CHECK(read_all(*crashed, GuestOffset(2_MiB + kCluster), 3000) == std::vector<std::byte>(3000));
  d.close();
}

TEST_CASE_TEMPLATE("a cluster that was populated may be written while a flush makes it durable", Kind, IMG_EVERY_KIND) {
  GatedDisk d(Kind::image({.size = 4_MiB}));
  must(d.disk->populate({GuestOffset(2_MiB), kCluster}));
  const auto gate = d.gates->hold(Call::flush, Point::after);
  auto flush = in_background([&] { return d.disk->flush(); });
  gate->wait_for_arrival();

  must(d.disk->write(GuestOffset(2_MiB), pattern(kCluster, 3)));
  gate->open();
  must(flush.get());

  CHECK(d.read(2_MiB, kCluster) == pattern(kCluster, 3));
  d.close();
}

TEST_CASE_TEMPLATE("flushes that arrive during a flush share the next one", Kind, IMG_EVERY_KIND) {
  GatedDisk d(Kind::image());
  must(d.disk->write(GuestOffset(2_MiB), pattern(3000, 1)));
  d.memory->counts().reset();
  const auto gate = d.gates->hold(Call::flush);
  std::vector<Background<Result<>>> flushes;
  flushes.push_back(in_background([&] { return d.disk->flush(); }));
  gate->wait_for_arrival();

  for (int i = 0; i < 8; ++i) flushes.push_back(in_background([&] { return d.disk->flush(); }));
  for (const auto& flush : flushes) CHECK(waits(flush));

  gate->open();
  for (auto& flush : flushes) must(flush.get());
  CHECK(d.memory->counts().flushes <= 3);  // two cycles, and the second has no tables to write
  d.close();
}

TEST_CASE_TEMPLATE("a flush that arrives during a flush covers what was written before it arrived", Kind,
                   IMG_EVERY_KIND) {
  auto crash = std::make_shared<CrashStorage>(Kind::image());
  auto gates = std::make_shared<GateStorage>(crash);
  auto disk = must(open_image(gates));
  must(disk->write(GuestOffset(0), pattern(kCluster, 1)));
  must(disk->flush());
  const auto gate = gates->hold(Call::flush, Point::after);  // the running flush is done but for telling so
  auto first = in_background([&] { return disk->flush(); });
  gate->wait_for_arrival();

  must(disk->write(GuestOffset(0), pattern(512, 2)));
  auto second = in_background([&] { return disk->flush(); });
  CHECK(waits(second));
  gate->open();
  must(first.get());
  must(second.get());

  CHECK(crash->pending() == 0);
  must(disk->close());
}

TEST_CASE_TEMPLATE("a table that is being loaded survives evictions, and is loaded once", Kind, IMG_EVERY_TABLE_KIND) {
  // Each table of 4 KiB maps 2 MiB, and the cache holds its minimum of 16.
  constexpr uint64_t kTable = 2_MiB, kTables = 32, kOther = 100_MiB;
  GatedDisk d(Kind::image({.size = 128_MiB, .cluster_size = 4096}), {.metadata_cache = 1});
  for (uint64_t i = 1; i < kTables; ++i) must(d.disk->write(GuestOffset(i * kTable), pattern(512, i)));
  must(d.disk->write(GuestOffset(kOther), pattern(512, 1)));
  must(d.disk->flush());
  const auto read_the_others = [&] {
    for (uint64_t i = 1; i < kTables; ++i) CHECK(d.read(i * kTable, 512) == pattern(512, i));
  };
  read_the_others();  // the table of `kOther` is gone

  std::atomic<int> loads = 0;
  HostOffset table;
  const auto gate = d.gates->hold(Call::read, Point::before, [&](HostRange range) {
    if (loads == 0) table = range.begin;
    if (range.begin == table) ++loads;
    return true;
  });
  auto first = in_background([&] { return d.read(kOther, 512); });
  gate->wait_for_arrival();
  auto second = in_background([&] { return d.read(kOther + 4096, 512); });
  CHECK(waits(second));
  read_the_others();

  gate->open();
  CHECK(first.get() == pattern(512, 1));
  CHECK(second.get() == std::vector<std::byte>(512));
  CHECK(loads == 1);
  d.close();
}

TEST_CASE_TEMPLATE("close waits for a flush in flight, and leaves nothing behind", Kind, IMG_EVERY_KIND) {
  GatedDisk d(Kind::image());
  must(d.disk->write(GuestOffset(2_MiB), pattern(3000, 1)));
  must(d.disk->discard({GuestOffset(0), kCluster}));
  const auto gate = d.gates->hold(Call::flush);
  auto flush = in_background([&] { return d.disk->flush(); });
  gate->wait_for_arrival();

  auto close = in_background([&] { return d.disk->close(); });
  CHECK(waits(close));

  gate->open();
  must(flush.get());
  must(close.get());
  const CheckReport report = check_image(d.memory->image());
  CHECK(report.corruptions == 0);
  CHECK(report.leaks == 0);
}

TEST_CASE_TEMPLATE("growing waits for requests in flight", Kind, IMG_EVERY_KIND) {
  GatedDisk d(Kind::image());
  const auto gate = d.gates->hold(Call::write, Point::before, of_length(3000));
  auto write = in_background([&] { return d.disk->write(GuestOffset(2_MiB), pattern(3000, 1)); });
  gate->wait_for_arrival();

  auto grow = in_background([&] { return d.disk->resize(1_GiB); });
  CHECK(waits(grow));

  gate->open();
  must(write.get());
  must(grow.get());
  CHECK(d.read(2_MiB, 3000) == pattern(3000, 1));
  d.close();
}

}  // namespace
}  // namespace imgfuse::test
