// Counts ahead: clusters are counted before anybody needs them, and the header says so.
#include <doctest/doctest.h>

#include "base/endian.h"
#include "faults.h"
#include "format/qcow2/qcow2.h"
#include "imgfuse/bitmaps.h"
#include "imgfuse/snapshots.h"
#include "support/builders.h"
#include "support/gate_storage.h"
#include "support/order_storage.h"
#include "support/qcow2_view.h"

namespace imgfuse::test {
namespace {

bool counts_ahead(const MemImage& image) { return Qcow2View::parse(image)->counts_ahead(); }
bool counts_ahead(const WatchedDisk& disk) { return counts_ahead(disk.memory->image()); }

/// Guest writes, each to clusters of its own and with an fsync.
void allocate(Disk& disk, GuestOffset from, int times) {
  for (int i = 0; i < times; ++i) {
    must(disk.write(from + static_cast<uint64_t>(i) * 128_KiB, pattern(100_KiB, static_cast<uint64_t>(i))));
    must(disk.flush());
  }
}

WatchedDisk disk_that_counts_ahead(const Qcow2Spec& spec = {}) {
  WatchedDisk disk = open_watched(make_qcow2(spec));
  allocate(*disk.disk, GuestOffset(0), 3);
  REQUIRE(counts_ahead(disk));
  return disk;
}

void check_closed(const WatchedDisk& disk) {
  CHECK_FALSE(counts_ahead(disk));
  CHECK(check_image(disk.memory->image()).clean());
}

uint64_t flushes_of(WatchedDisk& disk, GuestOffset at) {
  disk.memory->counts().reset();
  must(disk->write(at, pattern(4096)));
  must(disk->flush());
  return disk.memory->counts().flushes;
}

}  // namespace

TEST_CASE("counts ahead: they begin with the second flush that allocates, and a closed image has none") {
  WatchedDisk disk = open_watched(make_qcow2({}));
  allocate(*disk.disk, GuestOffset(0), 1);
  CHECK_FALSE(counts_ahead(disk));
  allocate(*disk.disk, GuestOffset(1_MiB), 1);
  CHECK(counts_ahead(disk));
  CHECK(check_image(disk.memory->image()).leaks > 900);  // of 64 MiB
  must(disk->close());
  check_closed(disk);
  CHECK(must(disk.memory->size()) < 1_MiB);

  disk = open_watched(disk.memory->image());
  must(disk->write(GuestOffset(0), pattern(100_KiB, 9)));  // in place
  must(disk->flush());
  must(disk->write(GuestOffset(1_MiB), pattern(100_KiB, 9)));
  must(disk->flush());
  CHECK_FALSE(counts_ahead(disk));
  must(disk->close());
}

TEST_CASE("counts ahead: an image that was not closed is read as it is, and opening it for writing frees them") {
  WatchedDisk disk = disk_that_counts_ahead();
  const MemImage crashed = disk.memory->image();
  must(disk->close());

  auto memory = std::make_shared<MemStorage>(crashed);
  auto reader = must(open_qcow2(memory, {.read_only = true}));
  CHECK(read_all(*reader, GuestOffset(256_KiB), 100_KiB) == pattern(100_KiB, 2));
  CHECK(memory->counts().writes == 0);
  const CheckReport report = check_image(crashed);
  CHECK(report.leaks > 900);
  CHECK(report.corruptions == 0);
  const MemImage sound = reopened(crashed);
  CHECK_FALSE(counts_ahead(sound));
  CHECK(check_image(sound).clean());
  CHECK(sound.size() < 1_MiB);
}

TEST_CASE("counts ahead: repairing leaks frees them as well") {
  WatchedDisk disk = disk_that_counts_ahead();
  MemStorage crashed(disk.memory->image());
  must(disk->close());
  CHECK(must(qcow2::check(crashed, Repair::leaks, {})).leaks_fixed > 900);
  CHECK_FALSE(counts_ahead(crashed.image()));
}

TEST_CASE("counts ahead: damage elsewhere does not keep the image from being opened") {
  WatchedDisk disk = disk_that_counts_ahead();
  auto crashed = std::make_shared<MemStorage>(disk.memory->image());
  must(disk->close());
  const Qcow2View view = *Qcow2View::parse(crashed->image());
  for (const Reference& reference : view.references())
    if (reference.owner.kind == Owner::Kind::l2_table) {
      const be<uint64_t> entry(0x30200);  // inside a cluster
      must(crashed->write(HostOffset(reference.cluster * 65536 + 4096), std::as_bytes(std::span(&entry, 1))));
    }
  auto again = must(open_qcow2(crashed));
  CHECK(read_all(*again, GuestOffset(0), 100_KiB) == pattern(100_KiB, 0));
  must(again->close());
}

TEST_CASE("counts ahead: what was freed is used first") {
  WatchedDisk disk = disk_that_counts_ahead();
  must(disk->discard({GuestOffset(0), 64_KiB}));
  must(disk->flush());
  CHECK(flushes_of(disk, GuestOffset(10_MiB)) == 2);  // old bytes could show
  CHECK(flushes_of(disk, GuestOffset(11_MiB)) == 1);
  must(disk->close());
  check_closed(disk);
}

TEST_CASE("counts ahead: what is copied from the backing file is made durable first") {
  MemImage backing;
  backing.write(0, pattern(16_MiB));
  WatchedDisk disk = open_watched(make_qcow2({.backing = "base"}), {.backing = backing});
  allocate(*disk.disk, GuestOffset(20_MiB), 3);
  CHECK(flushes_of(disk, GuestOffset(0)) == 2);
  CHECK(flushes_of(disk, GuestOffset(30_MiB)) == 1);  // past its end
  must(disk->close());
  check_closed(disk);
}

TEST_CASE("counts ahead: they go on, however much is written") {
  for (const uint32_t cluster_size : {512u, 4096u, 65536u}) {
    CAPTURE(cluster_size);
    WatchedDisk disk = open_watched(make_qcow2({.size = 1_GiB, .cluster_size = cluster_size}));
    disk.memory->counts().reset();
    uint64_t cycles = 0;
    for (uint64_t at = 0; at < 100_MiB; at += 512_KiB, ++cycles) {
      must(disk->write(GuestOffset(at), pattern(cluster_size, at)));
      if (cluster_size == 65536) must(disk->write(GuestOffset(at), pattern(512_KiB, at)));
      must(disk->flush());
    }
    // Now and then a refcount block lies in the way, and the table of them has to grow.
    CHECK(disk.memory->counts().flushes < cycles + cycles / 8);
    must(disk->close());
    check_closed(disk);
  }
}

TEST_CASE("counts ahead: what reads counts from disk, or replaces the header, finds them right") {
  const auto check = [](const std::string& name, const std::function<void(Disk&)>& change) {
    CAPTURE(name);
    WatchedDisk disk = disk_that_counts_ahead();
    change(*disk.disk);
    allocate(*disk.disk, GuestOffset(1_MiB), 4);
    CHECK(read_all(*disk.disk, GuestOffset(0), 100_KiB) == pattern(100_KiB, 0));
    must(disk->close());
    check_closed(disk);
  };
  check("create", [](Disk& disk) { (void)must(disk.snapshots()->create("one")); });
  check("create and apply", [](Disk& disk) {
    (void)must(disk.snapshots()->create("one"));
    allocate(disk, GuestOffset(0), 5);
    must(disk.snapshots()->apply("one"));
  });
  check("create and remove", [](Disk& disk) {
    (void)must(disk.snapshots()->create("one"));
    allocate(disk, GuestOffset(0), 5);
    must(disk.snapshots()->remove("one"));
  });
  check("grow", [](Disk& disk) { must(disk.resize(20_GiB)); });
  check("shrink", [](Disk& disk) { must(disk.resize(5_MiB, {.shrink = true})); });
  check("a bitmap", [](Disk& disk) { must(disk.bitmaps()->add("changes", 65536)); });
}

TEST_CASE("counts ahead: an fsync beside a snapshot counts nothing") {
  auto memory = std::make_shared<MemStorage>(make_qcow2({}));
  auto gates = std::make_shared<GateStorage>(std::make_shared<OrderStorage>(memory));
  auto disk = must(open_qcow2(gates));
  allocate(*disk, GuestOffset(0), 3);
  const auto gate =
      gates->hold(Call::write, Point::before, [](HostRange range) { return range.begin == HostOffset(24); });
  auto snapshot = in_background([&] { return disk->snapshots()->create("one"); });
  gate->wait_for_arrival();
  CHECK(check_image(memory->image()).leaks < 20);  // given back: only the copies of tables, not in use yet
  must(disk->flush());
  gate->open();
  (void)must(snapshot.get());
  allocate(*disk, GuestOffset(0), 3);
  must(disk->close());
  CHECK(check_image(memory->image()).clean());
}

TEST_CASE("counts ahead: a header without room for the mark does without") {
  const std::string name(376, 'b');
  MemImage backing;
  backing.resize(1_MiB);
  WatchedDisk disk = open_watched(make_qcow2({.cluster_size = 512, .backing = name}), {.backing = backing});
  for (uint64_t i = 0; i < 5; ++i) CHECK(flushes_of(disk, GuestOffset(2_MiB + i * 4096)) >= 2);
  disk.memory->counts().reset();
  (void)flushes_of(disk, GuestOffset(2_MiB + 5 * 4096));
  CHECK(disk.memory->counts().reads == 0);  // it is not tried again
  CHECK_FALSE(counts_ahead(disk));
  must(disk->close());
  check_closed(disk);
}

TEST_CASE("counts ahead: every request and closing may fail at any call") {
  constexpr uint64_t kCluster = Situation::kCluster;
  Situation s;
  s.image = make_qcow2({.size = s.size, .cluster_size = kCluster});
  s.content.resize(s.size);
  const auto allocate_thrice = [](Disk& disk, ModelDisk& model) -> Result<> {
    for (uint64_t i = 0; i < 3; ++i) {
      IMG_TRY(write(disk, model, i * 4 * kCluster, 2 * kCluster, i));
      IMG_TRY(flush(disk, model));
    }
    return {};
  };
  fail_everywhere(s, {"write", [&](Disk& disk, ModelDisk& model) -> Result<> {
                        IMG_TRY(allocate_thrice(disk, model));
                        return write(disk, model, 2_MiB - kCluster, 3 * kCluster, 2);
                      }});
  fail_everywhere(s, {"reuse", [&](Disk& disk, ModelDisk& model) -> Result<> {
                        IMG_TRY(allocate_thrice(disk, model));
                        model.zero({GuestOffset(0), 4 * kCluster});
                        IMG_TRY(disk.discard({GuestOffset(0), 4 * kCluster}));
                        IMG_TRY(flush(disk, model));
                        return write(disk, model, 60 * kCluster, 8 * kCluster, 1);
                      }});
  fail_everywhere(s, {"grow", [&](Disk& disk, ModelDisk& model) -> Result<> {
                        IMG_TRY(allocate_thrice(disk, model));
                        model.grow(20_GiB, 2 * kCluster);
                        IMG_TRY(disk.resize(20_GiB));
                        model.grown();
                        return {};
                      }});
  fail_closing(s, {"counting ahead", allocate_thrice});
}

}  // namespace imgfuse::test
