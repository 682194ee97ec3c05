// Many threads on one disk: overlapping reads, writes, zeroing, discards and flushes, with a tiny metadata cache.
#include <doctest/doctest.h>
#include <fmt/format.h>

#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <optional>
#include <thread>

#include "base/mutex.h"
#include "imgfuse/snapshots.h"
#include "support/builders.h"
#include "support/image_view.h"
#include "support/order_storage.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kSector = 512;
constexpr unsigned kThreads = 6;

/// What a sector holds: where it belongs, who wrote it, how often that thread had written before.
struct Block {
  uint64_t sector;
  uint64_t writer;
  uint64_t generation;
  std::array<uint64_t, 61> filling;

  static Block make(uint64_t sector, uint64_t writer, uint64_t generation) {
    Block block{sector, writer, generation, {}};
    for (size_t i = 0; i < block.filling.size(); ++i) block.filling[i] = (sector << 32 ^ generation * 31 ^ writer) + i;
    return block;
  }
  bool is_whole() const {
    const Block copy = make(sector, writer, generation);
    return std::memcmp(this, &copy, sizeof copy) == 0;
  }
  bool is_zero() const {
    static const Block zero{};
    return std::memcmp(this, &zero, sizeof zero) == 0;
  }
};
static_assert(sizeof(Block) == kSector);

/// The disk has three zones, each a third:
///   sectors   sector i belongs to thread i mod n, and whole clusters to nobody: partial writes meet in every cluster
///   clusters  cluster i belongs to thread i mod n, which also zeroes and discards it
///   everybody all threads do everything: a sector holds zeros or some thread's whole block, never another sector's
class Stress {
 public:
  Stress(const ImageSpec& spec, const MemImage& image, bool watched) : spec_(spec) {
    if (spec.backing)
      for (uint64_t sector = 0; sector < spec.size / kSector; ++sector) {
        const Block block = Block::make(sector, kThreads, 0);
        backing_.write(sector * kSector, std::as_bytes(std::span(&block, 1)));
      }
    memory_ = std::make_shared<MemStorage>(image);
    std::shared_ptr<Storage> storage = memory_;
    if (watched) storage = std::make_shared<OrderStorage>(memory_);
    MemImage data;
    data.resize(spec.size);
    disk_ = must(open_image(
        storage, {.metadata_cache = 1, .backing = backing_, .data = std::make_shared<MemStorage>(std::move(data))}));
    expected_.resize(spec.size / kSector);
    if (spec.backing)
      for (auto& generation : expected_) generation = {kThreads, 0};
  }

  void run(uint64_t requests) {
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < kThreads; ++t)
      threads.emplace_back([this, t, requests] {
        Rng rng(base_seed() * kThreads + t);
        for (uint64_t i = 0; i < requests && !failed_; ++i) request(t, rng);
      });
    for (std::thread& thread : threads) thread.join();
    CHECK(failure() == "");
  }

  /// As run(), with another thread that makes snapshots, sees that they stay as they are, and removes them.
  void run_beside_snapshots(uint64_t requests) {
    std::atomic<bool> done = false;
    std::thread snapshots([&] {
      while (!done && !failed_) keep_a_snapshot();
    });
    run(requests);
    done = true;
    snapshots.join();
    CHECK(failure() == "");
  }

  void finish() {
    for (uint64_t sector = 0; sector < 2 * zone_sectors() && !failed_; ++sector) verify_owned(sector);
    must(disk_->close());
    CHECK(failure() == "");
    CHECK(ImageView::parse(memory_->image())->find_corruption() == "");
    const CheckReport report = check_image(memory_->image());
    CHECK(report.corruptions == 0);
    CHECK(report.leaks == 0);
  }

 private:
  void keep_a_snapshot() {
    Snapshots& snapshots = *disk_->snapshots();
    const auto made = snapshots.create("one");
    if (!made) return fail_with("create: " + made.error().text());
    auto then = snapshots.open(made->id);
    if (!then) return fail_with("open: " + then.error().text());
    std::vector<std::byte> first(spec_.size), again(spec_.size);
    require((*then)->read(GuestOffset(0), first), "read a snapshot");
    std::this_thread::yield();
    require((*then)->read(GuestOffset(0), again), "read a snapshot again");
    if (first != again) fail_with("a snapshot has changed");
    require((*then)->close(), "close a snapshot");
    require(snapshots.remove(made->id), "remove");
  }

  struct Written {
    uint64_t writer = 0;
    uint64_t generation = 0;  // 0 of a writer below kThreads: zeros
  };

  uint64_t zone_sectors() const { return spec_.size / kSector / 3 / sectors_per_cluster() * sectors_per_cluster(); }
  uint64_t sectors_per_cluster() const { return spec_.cluster_size / kSector; }

  void request(unsigned thread, Rng& rng) {
    const uint64_t kind = rng.below(20);
    if (kind == 0) return require(disk_->flush(), "flush");
    if (kind < 7) return sectors_zone(thread, rng);
    if (kind < 13) return clusters_zone(thread, rng);
    everybodys_zone(thread, rng);
  }

  void sectors_zone(unsigned thread, Rng& rng) {
    const uint64_t sector = rng.below(zone_sectors() / kThreads) * kThreads + thread;
    if (sector >= zone_sectors()) return;
    switch (rng.below(4)) {
      case 0:
        return verify_owned(sector);
      case 1:
        require(disk_->write_zeroes(bytes(sector, 1), Zeroing::keep_allocation), "zero");
        expected_[sector] = {};
        return;
      default:
        write(thread, sector, 1);
    }
  }

  void clusters_zone(unsigned thread, Rng& rng) {
    const uint64_t clusters = zone_sectors() / sectors_per_cluster();
    const uint64_t cluster = rng.below(clusters) / kThreads * kThreads + thread;
    if (cluster >= clusters) return;
    const uint64_t first = zone_sectors() + cluster * sectors_per_cluster();
    const uint64_t sector = first + rng.below(sectors_per_cluster());
    const uint64_t left = first + sectors_per_cluster() - sector;
    switch (rng.below(8)) {
      case 0:
        require(disk_->discard(bytes(first, sectors_per_cluster())), "discard");
        return forget(first, sectors_per_cluster());
      case 1: {
        const Zeroing zeroing = rng.one_in(2) ? Zeroing::keep_allocation : Zeroing::may_free;
        require(disk_->write_zeroes(bytes(sector, left), zeroing), "zero");
        return forget(sector, left);
      }
      case 2:
        return require(disk_->populate(bytes(first, sectors_per_cluster()), rng.one_in(2) ? Holes::fill : Holes::keep),
                       "populate");
      case 3:
      case 4:
        for (uint64_t i = first; i < first + sectors_per_cluster(); ++i) verify_owned(i);
        return;
      default:
        write(thread, sector, rng.between(1, left));
    }
  }

  void everybodys_zone(unsigned thread, Rng& rng) {
    const uint64_t begin = 2 * zone_sectors();
    const uint64_t sectors = spec_.size / kSector - begin;
    const uint64_t sector = begin + rng.below(sectors);
    const uint64_t longest = std::min(sectors_per_cluster() * 3, begin + sectors - sector);
    const uint64_t count = rng.between(1, longest);
    switch (rng.below(8)) {
      case 0:
      case 1:
        return require(disk_->discard(bytes(sector, count)), "discard");
      case 2:
        return require(
            disk_->write_zeroes(bytes(sector, count), rng.one_in(2) ? Zeroing::keep_allocation : Zeroing::may_free),
            "zero");
      case 3:
      case 4: {
        std::vector<Block> found(count);
        require(disk_->read(GuestOffset(sector * kSector), std::as_writable_bytes(std::span(found))), "read");
        for (uint64_t i = 0; i < count; ++i)
          if (!found[i].is_zero() && (!found[i].is_whole() || found[i].sector != sector + i))
            fail_with(fmt::format("sector {} holds a piece of sector {} of thread {}", sector + i, found[i].sector,
                                  found[i].writer));
        return;
      }
      case 5: {
        const auto extents = disk_->map(bytes(sector, count));
        if (!extents) fail_with(extents.error().text());
        return;
      }
      default:
        write(thread, sector, count);
    }
  }

  void write(unsigned thread, uint64_t sector, uint64_t count) {
    thread_local uint64_t generation = 0;
    ++generation;
    std::vector<Block> blocks;
    for (uint64_t i = 0; i < count; ++i) blocks.push_back(Block::make(sector + i, thread, generation));
    require(disk_->write(GuestOffset(sector * kSector), std::as_bytes(std::span(blocks))), "write");
    if (sector >= 2 * zone_sectors()) return;
    for (uint64_t i = 0; i < count; ++i) expected_[sector + i] = {thread, generation};
  }

  void forget(uint64_t sector, uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) expected_[sector + i] = {};
  }

  /// Called by the sector's thread only (or at the end).
  void verify_owned(uint64_t sector) {
    Block found;
    require(disk_->read(GuestOffset(sector * kSector), std::as_writable_bytes(std::span(&found, 1))), "read");
    const Written& written = expected_[sector];
    const bool zeros = written.generation == 0 && written.writer != kThreads;
    const Block wanted = zeros ? Block{} : Block::make(sector, written.writer, written.generation);
    if (std::memcmp(&found, &wanted, sizeof found) != 0)
      fail_with(fmt::format("sector {} holds sector {} of thread {}, generation {}, not thread {}, generation {}",
                            sector, found.sector, found.writer, found.generation, written.writer, written.generation));
  }

  GuestRange bytes(uint64_t sector, uint64_t count) const { return {GuestOffset(sector * kSector), count * kSector}; }

  void require(const Result<>& result, const char* what) {
    if (!result) fail_with(std::string(what) + ": " + result.error().text());
  }
  std::string failure() EXCLUDES(mutex_) {
    Lock lock(mutex_);
    return failure_;
  }
  void fail_with(const std::string& what) EXCLUDES(mutex_) {
    Lock lock(mutex_);
    if (failure_.empty()) failure_ = what;
    failed_ = true;
  }

  const ImageSpec spec_;
  MemImage backing_;
  std::shared_ptr<MemStorage> memory_;
  std::unique_ptr<Disk> disk_;
  std::vector<Written> expected_;  // each element is its owner's
  std::atomic<bool> failed_ = false;

  Mutex mutex_;
  std::string failure_ GUARDED_BY(mutex_);
};

void stress(const ImageSpec& spec, const MemImage& image) {
  for (const bool watched : {false, true}) {
    INFO("IMG_SEED=" << base_seed() << ", cluster size " << spec.cluster_size << (watched ? ", order watched" : ""));
    Stress stress(spec, image, watched);
    const uint64_t requests = from_environment("IMG_RUNS", 4000);
    stress.run(watched ? requests / 4 : requests);
    stress.finish();
  }
}

template <class Kind>
void stress(const ImageSpec& spec) {
  stress(spec, Kind::image(spec));
}

void stress_snapshots(const ImageSpec& spec, const MemImage& image) {
  for (const bool watched : {false, true}) {
    INFO("IMG_SEED=" << base_seed() << (watched ? ", order watched" : ""));
    Stress stress(spec, image, watched);
    const uint64_t requests = from_environment("IMG_RUNS", 4000);
    stress.run_beside_snapshots(watched ? requests / 4 : requests);
    stress.finish();
  }
}

TEST_CASE("qcow2: snapshots come and go beside threads that write") {
  const ImageSpec spec{.size = 3_MiB, .cluster_size = 4096, .backing = "base"};
  stress_snapshots(spec, Qcow2Kind::image(spec));
}

TEST_CASE_TEMPLATE("threads do not disturb each other on 4 KiB clusters", Kind, IMG_EVERY_KIND) {
  stress<Kind>({.size = 12_MiB, .cluster_size = 4096});
}

TEST_CASE("qcow2: threads do not disturb each other on 512 byte clusters with wide counts") {
  stress({.size = 3_MiB, .cluster_size = 512}, make_qcow2({.size = 3_MiB, .cluster_size = 512, .refcount_bits = 64}));
}

TEST_CASE_TEMPLATE("threads do not disturb each other on 64 KiB clusters over a backing file", Kind, IMG_EVERY_KIND) {
  stress<Kind>({.size = 24_MiB + 512, .backing = "base"});
}

TEST_CASE("qcow2: threads do not disturb each other in version 2 over a backing file") {
  stress({.size = 6_MiB, .cluster_size = 4096, .backing = "base"},
         make_qcow2({.size = 6_MiB, .cluster_size = 4096, .version = 2, .backing = "base"}));
}

TEST_CASE("qcow2: threads do not disturb each other while counts are postponed") {
  stress({.size = 12_MiB, .cluster_size = 4096},
         make_qcow2({.size = 12_MiB, .cluster_size = 4096, .lazy_refcounts = true}));
  stress(
      {.size = 6_MiB, .cluster_size = 512, .backing = "base"},
      make_qcow2({.size = 6_MiB, .cluster_size = 512, .refcount_bits = 64, .backing = "base", .lazy_refcounts = true}));
}

TEST_CASE("qcow2: snapshots come and go beside threads that write while counts are postponed") {
  const ImageSpec spec{.size = 3_MiB, .cluster_size = 4096, .backing = "base"};
  stress_snapshots(
      spec,
      make_qcow2({.size = spec.size, .cluster_size = spec.cluster_size, .backing = "base", .lazy_refcounts = true}));
}

TEST_CASE("qcow2: threads do not disturb each other in a data file") {
  stress({.size = 6_MiB, .cluster_size = 4096, .backing = "base"},
         make_qcow2({.size = 6_MiB, .cluster_size = 4096, .backing = "base", .data_file = true}));
  stress({.size = 6_MiB, .cluster_size = 4096},
         make_qcow2({.size = 6_MiB, .cluster_size = 4096, .data_file = true, .data_file_raw = true}));
}

}  // namespace
}  // namespace imgfuse::test
