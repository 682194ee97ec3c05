// Internal snapshots: what they hold, what they are called, what is refused.
#include "imgfuse/snapshots.h"

#include <doctest/doctest.h>

#include <functional>

#include "base/endian.h"
#include "bytes.h"
#include "format/qcow2/qcow2.h"
#include "support/builders.h"
#include "support/model_disk.h"
#include "support/order_storage.h"
#include "support/qcow2_view.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kCluster = 4096;

void write(Disk& disk, uint64_t cluster, size_t clusters, uint64_t seed) {
  must(disk.write(GuestOffset(cluster * kCluster), pattern(clusters * kCluster, seed)));
}

std::vector<std::byte> read(Disk& disk, uint64_t cluster, size_t clusters = 1) {
  return read_all(disk, GuestOffset(cluster * kCluster), clusters * kCluster);
}

/// The image after closing: sound, and nothing in it is lost.
void close(WatchedDisk& disk) {
  must(disk->close());
  const MemImage image = disk.memory->image();
  CHECK(Qcow2View::parse(image)->find_corruption() == "");
  const CheckReport report = check_image(image);
  CHECK(report.corruptions == 0);
  CHECK(report.leaks == 0);
}

template <class T>
std::string error_of(const Result<T>& result) {
  return result ? "" : result.error().text();
}

WatchedDisk new_disk(const Qcow2Spec& spec = {.size = 16_MiB, .cluster_size = kCluster}) {
  return open_watched(make_qcow2(spec));
}

TEST_CASE("qcow2 snapshots: what is written after one does not change it, and going back finds it") {
  WatchedDisk disk = new_disk();
  write(*disk.disk, 0, 8, 1);
  write(*disk.disk, 2000, 8, 2);
  Snapshots& snapshots = *disk->snapshots();

  const SnapshotInfo made = must(snapshots.create("first"));

  CHECK(made.id == "1");
  CHECK(made.name == "first");
  CHECK(made.disk_size == 16_MiB);
  write(*disk.disk, 4, 8, 3);
  auto then = must(snapshots.open("first"));
  CHECK(then->size() == 16_MiB);
  CHECK(then->info().read_only);
  CHECK(read(*then, 0, 8) == pattern(8 * kCluster, 1));
  CHECK(read(*disk.disk, 4, 8) == pattern(8 * kCluster, 3));

  must(snapshots.apply("1"));
  CHECK(read(*disk.disk, 0, 8) == pattern(8 * kCluster, 1));
  CHECK(read(*disk.disk, 8, 4) == std::vector<std::byte>(4 * kCluster));
  CHECK(read(*disk.disk, 2000, 8) == pattern(8 * kCluster, 2));
  write(*disk.disk, 0, 1, 4);
  CHECK(read(*then, 0, 8) == pattern(8 * kCluster, 1));
  must(then->close());

  must(snapshots.remove("first"));
  CHECK(must(snapshots.list()).empty());
  CHECK(read(*disk.disk, 0) == pattern(kCluster, 4));
  CHECK(read(*disk.disk, 2000, 8) == pattern(8 * kCluster, 2));
  close(disk);
}

TEST_CASE("qcow2 snapshots: the id goes before the name, and what means none or several is refused") {
  WatchedDisk disk = new_disk();
  Snapshots& snapshots = *disk->snapshots();
  for (const uint64_t i : {1, 2, 3}) {
    write(*disk.disk, 0, 1, i);
    must(snapshots.create(i == 2 ? "1" : "daily"));
  }

  CHECK(read(*must(snapshots.open("1")), 0) == pattern(kCluster, 1));
  CHECK(read(*must(snapshots.open("3")), 0) == pattern(kCluster, 3));
  CHECK(error_of(snapshots.open("weekly")) == "no snapshot has the id or the name \"weekly\"");
  CHECK(error_of(snapshots.apply("weekly")) == "no snapshot has the id or the name \"weekly\"");
  CHECK(error_of(snapshots.remove("4")) == "no snapshot has the id or the name \"4\"");
  CHECK(error_of(snapshots.apply("daily")) == "2 snapshots are named \"daily\"; give the id of one of them: 1, 3");
  CHECK(error_of(snapshots.remove("1")) == "\"1\" is the id of one snapshot and the name of another, whose id is 2");
  CHECK(error_of(snapshots.create("")) == "a snapshot needs a name");
  CHECK(error_of(snapshots.create(std::string(256, 'x'))) == "a snapshot name of 256 bytes is longer than 255");

  must(snapshots.remove("2"));
  must(snapshots.remove("3"));
  CHECK(must(snapshots.create("next")).id == "2");
  close(disk);
}

TEST_CASE("qcow2 snapshots: counts that would overflow are refused before anything is written") {
  for (const uint32_t bits : {1u, 2u, 4u}) {
    CAPTURE(bits);
    WatchedDisk disk = new_disk({.size = 16_MiB, .cluster_size = kCluster, .refcount_bits = bits});
    write(*disk.disk, 0, 8, 1);
    must(disk->flush());
    Snapshots& snapshots = *disk->snapshots();
    for (uint32_t i = 1; i < (1u << bits) - 1; ++i) must(snapshots.create("one more"));
    must(disk->flush());
    must(disk->flush());
    const uint64_t size = must(disk.memory->size());
    disk.memory->counts().reset();

    const std::string error = error_of(snapshots.create("too many"));

    CHECK(error.find(fmt::format("more than {} references, which is what counts of {} bits end at", (1 << bits) - 1,
                                 bits)) != std::string::npos);
    CHECK(disk.memory->counts().writes == 0);
    CHECK(must(disk.memory->size()) == size);
    CHECK(must(snapshots.list()).size() == (1u << bits) - 2);
    write(*disk.disk, 2, 8, 2);
    CHECK(read(*disk.disk, 2, 8) == pattern(8 * kCluster, 2));
    close(disk);
  }
}

TEST_CASE("qcow2 snapshots: one that is open is not removed") {
  WatchedDisk disk = new_disk();
  write(*disk.disk, 0, 1, 1);
  Snapshots& snapshots = *disk->snapshots();
  must(snapshots.create("first"));
  must(snapshots.create("second"));
  auto one = must(snapshots.open("first"));
  auto two = must(snapshots.open("first"));

  CHECK(error_of(snapshots.remove("first")) == "snapshot 1 (first) is open");
  must(one->close());
  CHECK_FALSE(snapshots.remove("first"));
  must(snapshots.remove("second"));
  must(two->close());
  must(snapshots.remove("first"));
  close(disk);
}

TEST_CASE("qcow2 snapshots: a read-only disk lists and opens them, and refuses to change them") {
  WatchedDisk made = new_disk();
  write(*made.disk, 0, 1, 1);
  must(made->snapshots()->create("first"));
  write(*made.disk, 0, 1, 2);
  close(made);

  const WatchedDisk disk = open_watched(made.memory->image(), {.read_only = true});
  Snapshots& snapshots = *disk->snapshots();

  CHECK(must(snapshots.list()).size() == 1);
  CHECK(read(*must(snapshots.open("1")), 0) == pattern(kCluster, 1));
  CHECK(snapshots.create("no").error().code() == ErrorCode::read_only);
  CHECK(snapshots.apply("1").error().code() == ErrorCode::read_only);
  CHECK(snapshots.remove("1").error().code() == ErrorCode::read_only);
  must(disk->close());

  auto then = must(qcow2::open(made.memory, {.read_only = true, .snapshot = "first"}));
  CHECK(read(*then, 0) == pattern(kCluster, 1));
  CHECK(then->snapshots() == nullptr);
  CHECK(error_of(qcow2::open(made.memory, {.read_only = true, .snapshot = "second"})) ==
        "no snapshot has the id or the name \"second\"");
  CHECK(error_of(qcow2::open(made.memory, {.snapshot = "first"})) == "a snapshot can only be opened read-only");
}

TEST_CASE("qcow2 snapshots: each has the size that the disk had, and going back restores it") {
  WatchedDisk disk = new_disk();
  write(*disk.disk, 0, 8, 1);
  write(*disk.disk, 4095, 1, 5);
  Snapshots& snapshots = *disk->snapshots();
  must(snapshots.create("small"));
  must(disk->resize(2_GiB));
  must(disk->write(GuestOffset(1_GiB), pattern(kCluster, 2)));
  must(snapshots.create("large"));

  CHECK(must(snapshots.open("small"))->size() == 16_MiB);
  must(snapshots.apply("small"));
  CHECK(disk->size() == 16_MiB);
  CHECK(read(*disk.disk, 4095) == pattern(kCluster, 5));
  CHECK(disk->allocated() == 9 * kCluster);
  must(disk->resize(2_GiB));
  CHECK(read_all(*disk.disk, GuestOffset(1_GiB), kCluster) == std::vector<std::byte>(kCluster));
  must(snapshots.apply("large"));
  CHECK(disk->size() == 2_GiB);
  CHECK(read_all(*disk.disk, GuestOffset(1_GiB), kCluster) == pattern(kCluster, 2));
  close(disk);
}

TEST_CASE("qcow2 snapshots: removing one gives its host space back") {
  WatchedDisk disk = new_disk({.size = 64_MiB, .cluster_size = 65536});
  must(disk->write(GuestOffset(0), pattern(16_MiB, 1)));
  Snapshots& snapshots = *disk->snapshots();
  must(snapshots.create("first"));
  must(disk->discard({GuestOffset(0), 16_MiB}));
  must(disk->flush());
  CHECK(must(disk.memory->allocated()) > 16_MiB);

  must(snapshots.remove("first"));

  CHECK(must(disk.memory->allocated()) < 2_MiB);
  must(disk->write(GuestOffset(32_MiB), pattern(8_MiB, 2)));
  must(disk->flush());
  close(disk);
  CHECK(must(disk.memory->size()) < 20_MiB);  // the space is found again
}

TEST_CASE("qcow2 snapshots: tables that nothing was written to are shared, not copied") {
  WatchedDisk disk = new_disk({.size = 64_MiB, .cluster_size = 4096});
  for (uint64_t at = 0; at < 64_MiB; at += 2_MiB) must(disk->write(GuestOffset(at), pattern(kCluster, at)));
  Snapshots& snapshots = *disk->snapshots();
  must(snapshots.create("first"));
  must(disk->flush());
  must(disk->flush());
  const uint64_t size = must(disk.memory->size());

  for (int i = 0; i < 8; ++i) {
    must(snapshots.create("again"));
    must(disk->flush());
    must(disk->flush());
  }

  CHECK(must(disk.memory->size()) < size + 12 * kCluster);
  close(disk);
}

/// Three generations of random requests, each kept by a snapshot, in all orders of removal.
void run_generations(const Qcow2Spec& spec, const MemImage& image, const MemImage& start, Rng& rng) {
  CAPTURE(spec.cluster_size);
  CAPTURE(spec.refcount_bits);
  CAPTURE(spec.version);
  WatchedDisk disk = open_watched(image);
  Snapshots& snapshots = *disk->snapshots();
  ModelDisk model(spec.size, windows_for(spec.size, spec.cluster_size, spec.cluster_size <= 4096 ? 12 : 3), start);
  std::vector<ModelDisk> kept;
  std::string what;
  const auto requests = [&] {
    for (int i = 0; i < 8; ++i) must(random_request(*disk.disk, model, {.cluster_size = spec.cluster_size}, rng, what));
  };
  const uint64_t generations = spec.refcount_bits == 2 ? 1 : 3;
  for (uint64_t i = 0; i < generations; ++i) {
    requests();
    must(snapshots.create(fmt::format("generation {}", i + 1)));
    kept.push_back(model);
  }
  requests();
  const auto check_all = [&] {
    CHECK(model.compare_exactly(*disk.disk) == "");
    for (const SnapshotInfo& info : must(snapshots.list())) {
      auto then = must(snapshots.open(info.id));
      CHECK(kept[std::stoul(info.id) - 1].compare_exactly(*then) == "");
      must(then->close());
    }
  };
  check_all();
  while (!must(snapshots.list()).empty()) {
    const auto list = must(snapshots.list());
    const std::string id = list[rng.below(list.size())].id;
    must(snapshots.apply(id));
    model = kept[std::stoul(id) - 1];
    check_all();
    requests();
    must(snapshots.remove(list[rng.below(list.size())].id));
    check_all();
    requests();
  }
  close(disk);
}

TEST_CASE("qcow2 snapshots: with extended L2 entries they keep what was written") {
  Rng rng(base_seed());
  for (const uint32_t cluster_size : {16384u, 65536u}) {
    const Qcow2Spec spec{.size = 40_MiB + 1536, .cluster_size = cluster_size, .extended_l2 = true};
    MemImage zeros;
    zeros.resize(spec.size);
    run_generations(spec, make_qcow2(spec), zeros, rng);
  }
}

TEST_CASE("qcow2 snapshots: every cluster size and refcount width keeps what was written") {
  Rng rng(base_seed());
  for (const uint32_t cluster_size : {512u, 4096u, 65536u})
    for (const uint32_t bits : {2u, 4u, 8u, 16u, 32u, 64u}) {
      const Qcow2Spec spec{.size = cluster_size == 512 ? 100_KiB : 40_MiB + 1536,
                           .cluster_size = cluster_size,
                           .refcount_bits = bits,
                           .version = bits == 16 && cluster_size == 4096 ? 2u : 3u};
      MemImage zeros;
      zeros.resize(spec.size);
      run_generations(spec, make_qcow2(spec), zeros, rng);
    }
}

/// What a damaged snapshot says to whoever uses it. Nothing may have been written.
struct Damage {
  const char* name;
  std::function<void(MemImage&, uint64_t l1, uint64_t l2)> make;
  const char* error;
};

TEST_CASE("qcow2 snapshots: a damaged one is refused, and nothing is written") {
  WatchedDisk made = new_disk();
  write(*made.disk, 0, 8, 1);
  write(*made.disk, 2000, 8, 1);
  must(made->snapshots()->create("first"));
  write(*made.disk, 0, 1, 2);
  close(made);
  const Damage list[] = {
      {"L1 past the end", [](MemImage& i, uint64_t, uint64_t) { poke<uint64_t>(i, peek<uint64_t>(i, 64), 1_GiB); },
       "past the end of the file"},
      {"L1 unaligned", [](MemImage& i, uint64_t l1, uint64_t) { poke<uint64_t>(i, peek<uint64_t>(i, 64), l1 + 512); },
       "not a multiple of the cluster size"},
      {"one table twice", [](MemImage& i, uint64_t l1, uint64_t l2) { poke<uint64_t>(i, l1 + 8, l2); },
       "used twice as a table"},
      {"table without count", [](MemImage& i, uint64_t l1, uint64_t) { poke<uint64_t>(i, l1, 1_GiB); },
       "has no reference count"},
      {"reserved bits in L1", [](MemImage& i, uint64_t l1, uint64_t l2) { poke<uint64_t>(i, l1, l2 | 2); },
       "no place of a table"},
      {"data at the header", [](MemImage& i, uint64_t, uint64_t l2) { poke<uint64_t>(i, l2, peek<uint64_t>(i, 40)); },
       "points at metadata"},
      {"data past the end", [](MemImage& i, uint64_t, uint64_t l2) { poke<uint64_t>(i, l2, 1_TiB); },
       "has no reference count"},
      {"data in the middle of a cluster",
       [](MemImage& i, uint64_t, uint64_t l2) { poke<uint64_t>(i, l2, peek<uint64_t>(i, l2) | 512); },
       "into the middle of a cluster"},
  };
  for (const Damage& damage : list) {
    CAPTURE(damage.name);
    MemImage image = made.memory->image();
    const uint64_t l1 = peek<uint64_t>(image, peek<uint64_t>(image, 64));
    damage.make(image, l1, peek<uint64_t>(image, l1) & 0x00fffffffffffe00);
    auto memory = std::make_shared<MemStorage>(image);
    auto disk = must(open_qcow2(memory));
    memory->counts().reset();

    CHECK(error_of(disk->snapshots()->remove("first")).find(damage.error) != std::string::npos);
    CHECK(error_of(disk->snapshots()->apply("first")).find(damage.error) != std::string::npos);

    CHECK(memory->counts().writes == 0);
    CHECK(read_all(*disk, GuestOffset(0), kCluster) == pattern(kCluster, 2));
    must(disk->close());
  }
}

TEST_CASE("qcow2 snapshots: a damaged snapshot table does not keep the disk from being used") {
  WatchedDisk made = new_disk();
  must(made->snapshots()->create("first"));
  close(made);
  MemImage image = made.memory->image();
  poke<uint32_t>(image, peek<uint64_t>(image, 64) + 36, 5000);  // extra data
  auto disk = must(open_qcow2(std::make_shared<MemStorage>(image)));

  must(disk->write(GuestOffset(0), pattern(kCluster, 1)));
  CHECK(error_of(disk->snapshots()->list()) == "snapshot 0 has 5000 bytes of extra data, more than 1024");
  CHECK(error_of(disk->snapshots()->create("second")) == "snapshot 0 has 5000 bytes of extra data, more than 1024");
  CHECK_FALSE(disk->snapshots()->open("first"));
  must(disk->close());
}

TEST_CASE("qcow2 snapshots: an image with more clusters than are counted at once") {
  // Half of the data is put behind 8 GiB, where a window of counts begins for clusters of 512 bytes, and check counts
  // it.
  WatchedDisk made = open_watched(make_qcow2({.size = 64_KiB, .cluster_size = 512}));
  must(made->write(GuestOffset(0), pattern(64_KiB, 1)));
  must(made->close());
  MemImage image = made.memory->image();
  const uint64_t far = 8_GiB + 64_KiB;
  const uint64_t table = peek<uint64_t>(image, peek<uint64_t>(image, 40)) & 0x00fffffffffffe00;
  for (uint64_t i = 0; i < 32; ++i) {
    const auto bytes = pattern(64_KiB, 1);
    image.write(far + i * 512, std::span(bytes).subspan(i * 512, 512));
    poke<uint64_t>(image, table + i * 8, (far + i * 512) | uint64_t{1} << 63);
  }
  auto memory = std::make_shared<MemStorage>(image);
  must(qcow2::check(*memory, Repair::all, [](const std::string&) {}));

  auto disk = must(open_qcow2(memory));
  Snapshots& snapshots = *disk->snapshots();
  must(snapshots.create("first"));
  must(disk->write(GuestOffset(4096), pattern(8192, 2)));
  must(disk->write(GuestOffset(40960), pattern(8192, 3)));
  CHECK(read_all(*must(snapshots.open("1")), GuestOffset(0), 64_KiB) == pattern(64_KiB, 1));
  must(snapshots.apply("first"));
  must(snapshots.remove("first"));
  CHECK(read_all(*disk, GuestOffset(0), 64_KiB) == pattern(64_KiB, 1));
  CHECK(disk->allocated() == 64_KiB);
  must(disk->close());
  CHECK(Qcow2View::parse(memory->image())->find_corruption() == "");
}

}  // namespace
}  // namespace imgfuse::test
