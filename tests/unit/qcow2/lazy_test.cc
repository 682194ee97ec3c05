// Lazy refcounts: counts are postponed while the dirty bit is set.
#include <doctest/doctest.h>

#include "base/endian.h"
#include "faults.h"
#include "format/qcow2/header.h"
#include "format/qcow2/qcow2_disk.h"
#include "imgfuse/snapshots.h"
#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/fault_storage.h"
#include "support/gate_storage.h"
#include "support/order_storage.h"
#include "support/qcow2_view.h"

namespace imgfuse::test {
namespace {

const Qcow2Spec kLazy{.size = 64_MiB, .lazy_refcounts = true};

uint64_t incompatible(const MemImage& image) {
  be<uint64_t> field;
  image.read(qcow2::kIncompatibleField.bytes(), std::as_writable_bytes(std::span(&field, 1)));
  return field;
}

bool is_dirty(const MemStorage& memory) { return (incompatible(memory.image()) & qcow2::kDirty) != 0; }
bool is_dirty(const WatchedDisk& disk) { return is_dirty(*disk.memory); }

void check_closed(const WatchedDisk& disk) {
  CHECK(incompatible(disk.memory->image()) == 0);
  CHECK(check_image(disk.memory->image()).clean());
}

/// A disk whose counts on disk are out of date.
WatchedDisk dirty_disk(const Qcow2Spec& spec = kLazy) {
  WatchedDisk disk = open_watched(make_qcow2(spec));
  must(disk->write(GuestOffset(0), pattern(200_KiB)));
  must(disk->flush());
  REQUIRE(is_dirty(disk));
  return disk;
}

struct Fsyncs {
  uint64_t flushes = 0, bytes = 0;
};

/// What `n` writes of 4 KiB cost, each to another cluster and with an fsync of its own, in the long run.
Fsyncs cost_of_allocating(const Qcow2Spec& spec, uint64_t n) {
  WatchedDisk disk = open_watched(make_qcow2(spec));
  for (uint64_t i = 0; i < 2 * n; ++i) {
    if (i == n) disk.memory->counts().reset();
    must(disk->write(GuestOffset(i * 128_KiB), pattern(4096, i)));
    must(disk->flush());
  }
  const Fsyncs cost{disk.memory->counts().flushes, disk.memory->counts().bytes_written};
  must(disk->close());
  CHECK(check_image(disk.memory->image()).clean());
  return cost;
}

}  // namespace

TEST_CASE("qcow2: an fsync that allocates costs one host flush and no writing of counts, lazy or counted ahead") {
  constexpr uint64_t kFsyncs = 100;
  for (const Qcow2Spec& spec : {Qcow2Spec{}, kLazy}) {
    const Fsyncs cost = cost_of_allocating(spec, kFsyncs);
    CHECK(cost.flushes == kFsyncs);
    CHECK(cost.bytes == kFsyncs * (4096 + 512));
  }
}

TEST_CASE("lazy refcounts: data is made durable first where old bytes could show") {
  Qcow2Spec spec = kLazy;
  spec.backing = "base";
  MemImage backing;
  backing.write(0, pattern(64_MiB / 4));
  WatchedDisk disk = open_watched(make_qcow2(spec), {.backing = backing});
  for (const uint64_t at : {uint64_t{0}, 1_MiB}) {  // a copy of what the backing file has
    disk.memory->counts().reset();
    must(disk->write(GuestOffset(at), pattern(4096, 1)));
    must(disk->flush());
    CHECK(disk.memory->counts().flushes == 2);
  }
  disk.memory->counts().reset();
  must(disk->write(GuestOffset(40_MiB), pattern(4096, 2)));  // past its end
  must(disk->flush());
  CHECK(disk.memory->counts().flushes == 1);
  must(disk->discard({GuestOffset(1_MiB), 64_KiB}));
  must(disk->flush());
  disk.memory->counts().reset();
  must(disk->write(GuestOffset(41_MiB), pattern(4096, 3)));  // where the discarded cluster was
  must(disk->flush());
  CHECK(disk.memory->counts().flushes == 2);
  must(disk->close());
  check_closed(disk);
}

TEST_CASE("lazy refcounts: the dirty bit comes with the first fsync that allocates, and goes when the disk is closed") {
  WatchedDisk disk = open_watched(make_qcow2(kLazy));
  must(disk->write(GuestOffset(0), pattern(4096)));
  CHECK_FALSE(is_dirty(disk));
  must(disk->flush());
  CHECK(is_dirty(disk));
  must(disk->close());
  check_closed(disk);

  disk = open_watched(disk.memory->image());
  must(disk->write(GuestOffset(0), pattern(4096, 2)));  // in place
  must(disk->flush());
  CHECK_FALSE(is_dirty(disk));
  must(disk->close());
  check_closed(disk);
}

TEST_CASE("lazy refcounts: a closed image has no more clusters than a strict one") {
  uint64_t sizes[2];
  for (const bool lazy : {false, true}) {
    WatchedDisk disk = open_watched(make_qcow2({.size = 64_MiB, .lazy_refcounts = lazy}));
    for (uint64_t at = 0; at < 20_MiB; at += 1_MiB) {
      must(disk->write(GuestOffset(at), pattern(300_KiB, at)));
      must(disk->flush());
    }
    must(disk->close());
    sizes[lazy] = must(disk.memory->size());
  }
  CHECK(sizes[1] < sizes[0] + 65536);
}

TEST_CASE("lazy refcounts: a dirty image is read as it is, and opening it for writing counts anew") {
  WatchedDisk disk = dirty_disk();
  const MemImage crashed = disk.memory->image();
  must(disk->close());

  auto memory = std::make_shared<MemStorage>(crashed);
  auto reader = must(open_qcow2(memory, {.read_only = true}));
  CHECK(read_all(*reader, GuestOffset(0), 200_KiB) == pattern(200_KiB));
  CHECK(memory->counts().writes == 0);
  const MemImage sound = reopened(crashed);
  CHECK(incompatible(sound) == 0);
  CHECK(check_image(sound).clean());
}

TEST_CASE("lazy refcounts: what reads counts from disk, or replaces the header, finds them right") {
  const auto check = [](const std::string& name, const std::function<void(Disk&)>& change, bool dirty_behind) {
    CAPTURE(name);
    WatchedDisk disk = dirty_disk();
    change(*disk.disk);
    CHECK(is_dirty(disk) == dirty_behind);
    std::vector<std::byte> front = pattern(200_KiB);
    front.resize(100_KiB);
    CHECK(read_all(*disk.disk, GuestOffset(0), 100_KiB) == front);
    must(disk->write(GuestOffset(1_MiB), pattern(4096)));
    must(disk->flush());
    CHECK(is_dirty(disk));
    must(disk->close());
    check_closed(disk);
  };
  check(
      "create", [](Disk& disk) { (void)must(disk.snapshots()->create("one")); }, false);
  check(
      "create and apply",
      [](Disk& disk) {
        (void)must(disk.snapshots()->create("one"));
        must(disk.write(GuestOffset(150_KiB), pattern(70_KiB)));
        must(disk.flush());
        must(disk.snapshots()->apply("one"));
      },
      false);
  check(
      "create and remove",
      [](Disk& disk) {
        (void)must(disk.snapshots()->create("one"));
        must(disk.write(GuestOffset(150_KiB), pattern(70_KiB)));
        must(disk.flush());
        must(disk.snapshots()->remove("one"));
      },
      false);
  check(
      "grow", [](Disk& disk) { must(disk.resize(20_GiB)); }, false);
  check(
      "shrink", [](Disk& disk) { must(disk.resize(2_MiB, {.shrink = true})); }, false);
  check(
      "a bitmap", [](Disk& disk) { must(disk.bitmaps()->add("changes", 65536)); }, true);
}

TEST_CASE("lazy refcounts: damage that is met leaves both bits") {
  auto memory = std::make_shared<MemStorage>(make_qcow2(kLazy));
  auto disk = must(open_qcow2(memory, {.metadata_cache = 1}));
  must(disk->write(GuestOffset(0), pattern(200_KiB)));
  must(disk->flush());
  const Qcow2View view = *Qcow2View::parse(memory->image());
  for (const Reference& reference : view.references())
    if (reference.owner.kind == Owner::Kind::l2_table) {
      const be<uint64_t> entry(0x30200);  // inside a cluster, in a slice that nobody has looked at
      must(memory->write(HostOffset(reference.cluster * 65536 + 4096), std::as_bytes(std::span(&entry, 1))));
    }
  std::vector<std::byte> bytes(512);
  CHECK_FALSE(disk->read(GuestOffset(512 * 64_KiB), bytes));
  CHECK_FALSE(disk->close());
  CHECK(incompatible(memory->image()) == (qcow2::kDirty | qcow2::kCorrupt));
}

TEST_CASE("lazy refcounts: postponed counts do not take more memory than the metadata cache has") {
  auto memory = std::make_shared<MemStorage>(
      make_qcow2({.size = 512_MiB, .cluster_size = 512, .refcount_bits = 64, .lazy_refcounts = true}));
  auto disk = must(open_qcow2(memory, {.metadata_cache = 64_KiB}));
  uint64_t most = 0;
  for (uint64_t i = 0; i < 8192; ++i) {
    must(disk->write(GuestOffset(i * 64_KiB), pattern(512, i)));
    most = std::max(most, disk->statistics().tables);
  }
  CHECK(most <= 64_KiB / (512 + 256) + 8);
  must(disk->close());
  CHECK(check_image(memory->image()).clean());
}

TEST_CASE("lazy refcounts: an fsync beside a snapshot does not postpone counts") {
  auto memory = std::make_shared<MemStorage>(make_qcow2(kLazy));
  auto gates = std::make_shared<GateStorage>(std::make_shared<OrderStorage>(memory));
  auto disk = must(open_qcow2(gates));
  must(disk->write(GuestOffset(0), pattern(200_KiB)));
  must(disk->flush());
  const auto gate =
      gates->hold(Call::write, Point::before, [](HostRange range) { return range.begin == HostOffset(24); });
  auto snapshot = in_background([&] { return disk->snapshots()->create("one"); });
  gate->wait_for_arrival();
  CHECK_FALSE(is_dirty(*memory));
  must(disk->flush());
  CHECK_FALSE(is_dirty(*memory));
  gate->open();
  (void)must(snapshot.get());
  must(disk->close());
  CHECK(check_image(memory->image()).clean());
}

TEST_CASE("lazy refcounts: entries that are linked while the dirty bit is on its way wait for the next fsync") {
  auto memory = std::make_shared<MemStorage>(make_qcow2(kLazy));
  auto gates = std::make_shared<GateStorage>(std::make_shared<OrderStorage>(memory));
  auto disk = must(open_qcow2(gates));
  must(disk->write(GuestOffset(0), pattern(4096)));
  const auto gate =
      gates->hold(Call::write, Point::before, [](HostRange range) { return range.begin == qcow2::kIncompatibleField; });
  auto flush = in_background([&] { return disk->flush(); });
  gate->wait_for_arrival();
  must(disk->write(GuestOffset(1_MiB), pattern(4096, 2)));
  gate->open();
  must(flush.get());
  const auto crashed = must(open_qcow2(std::make_shared<MemStorage>(memory->image()), {.read_only = true}));
  CHECK(read_all(*crashed, GuestOffset(0), 4096) == pattern(4096));
  CHECK(read_all(*crashed, GuestOffset(1_MiB), 4096) == std::vector<std::byte>(4096));
  must(disk->close());
  CHECK(check_image(memory->image()).clean());
}

TEST_CASE("lazy refcounts: every request may fail at any call") {
  constexpr uint64_t kCluster = Situation::kCluster;
  Situation s;
  s.image = make_qcow2({.size = s.size, .cluster_size = kCluster, .lazy_refcounts = true});
  s.content.resize(s.size);
  fail_everywhere(s, {"write", [](Disk& disk, ModelDisk& model) -> Result<> {
                        IMG_TRY(write(disk, model, 100, 5 * kCluster, 1));
                        IMG_TRY(flush(disk, model));
                        return write(disk, model, 2_MiB - kCluster, 3 * kCluster, 2);
                      }});
  fail_everywhere(s, {"reuse", [](Disk& disk, ModelDisk& model) -> Result<> {
                        IMG_TRY(write(disk, model, 0, 8 * kCluster, 1));
                        IMG_TRY(flush(disk, model));
                        model.zero({GuestOffset(0), 4 * kCluster});
                        IMG_TRY(disk.discard({GuestOffset(0), 4 * kCluster}));
                        IMG_TRY(flush(disk, model));
                        return write(disk, model, 60 * kCluster, 8 * kCluster, 1);
                      }});
  fail_everywhere(s, {"grow", [](Disk& disk, ModelDisk& model) -> Result<> {
                        IMG_TRY(write(disk, model, 0, 8 * kCluster, 1));
                        IMG_TRY(flush(disk, model));
                        model.grow(20_GiB, 2 * kCluster);
                        IMG_TRY(disk.resize(20_GiB));
                        model.grown();
                        return {};
                      }});
}

TEST_CASE("lazy refcounts: closing may fail at any call") {
  constexpr uint64_t kCluster = Situation::kCluster;
  Situation s;
  s.image = make_qcow2({.size = s.size, .cluster_size = kCluster, .lazy_refcounts = true});
  s.content.resize(s.size);
  fail_closing(s, {"postponing counts", [](Disk& disk, ModelDisk& model) -> Result<> {
                     IMG_TRY(write(disk, model, 0, 4 * kCluster, 1));
                     IMG_TRY(flush(disk, model));
                     return write(disk, model, 50 * kCluster, 4 * kCluster, 1);
                   }});
}

}  // namespace imgfuse::test
