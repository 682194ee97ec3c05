#include <doctest/doctest.h>

#include "format/registry.h"
#include "support/crash_storage.h"
#include "support/order_storage.h"
#include "unit/job/disks.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kSize = 5 * 1024 * 1024 + 512;

/// An overlay as commit() wants it: opened without what lies below.
JobDisk without_backing(const JobDisk& overlay) {
  auto memory = std::make_shared<MemStorage>(overlay.memory->image());
  auto faults = std::make_shared<FaultStorage>(memory);
  const BackingOpener nothing = [](const std::string&, const std::optional<std::string>&) {
    return Result<std::unique_ptr<Disk>>(nullptr);
  };
  const Format* format = must(probe_format(*faults));
  auto disk = must(format->open(faults, {.open_backing = nothing}));
  return {memory, faults, std::unique_ptr<Disk, CloseDisk>(disk.release())};
}

JobDisk raw_disk_of(const MemImage& image) {
  auto memory = std::make_shared<MemStorage>(image);
  auto faults = std::make_shared<FaultStorage>(memory);
  auto disk = must(raw::open(faults, {}));
  return {memory, faults, std::unique_ptr<Disk, CloseDisk>(disk.release())};
}

}  // namespace

TEST_CASE_TEMPLATE("commit: the base reads as the overlay did, also where it has to grow", Kind, IMG_EVERY_KIND) {
  Rng rng(base_seed());
  for (const uint64_t base_size : {kSize, kSize - 2_MiB - 300, kSize + 2_MiB}) {
    const MemImage base_image = scribbled_image(base_size, rng);
    JobDisk overlay = disk_of(Kind::image({.size = kSize, .cluster_size = 4096, .backing = "base"}), base_image);
    scribble(*overlay, rng);
    must(overlay->flush());
    const auto expected = content(*overlay);
    JobDisk base = raw_disk_of(base_image);
    JobDisk alone = without_backing(overlay);

    must(commit(*alone, *base, 1));

    CHECK(read_all(*base, GuestOffset(0), kSize) == expected);
    CHECK(base->size() == std::max(base_size, kSize));
    CHECK(base.memory->counts().flushes > 0);
  }
}

TEST_CASE("commit: whatever call fails, the overlay still reads as before over the base") {
  Rng rng(base_seed());
  const MemImage base_image = scribbled_image(kSize, rng);
  JobDisk overlay = qcow2_disk({.size = kSize, .backing = "base"}, base_image);
  scribble(*overlay, rng);
  must(overlay->flush());
  const auto expected = content(*overlay);
  for (uint64_t n = 1; n < 200; ++n) {
    CAPTURE(n);
    JobDisk base = raw_disk_of(base_image);
    JobDisk alone = without_backing(overlay);
    base.faults->fail_call(n, ErrorCode::no_space);

    const auto committed = commit(*alone, *base, 1);

    if (!base.faults->fired()) break;
    CHECK(!committed);
    base.disk.reset();
    auto whole = must(open_image(std::make_shared<MemStorage>(overlay.memory->image()),
                                 {.read_only = true, .backing = base.memory->image()}));
    CHECK(content(*whole) == expected);
    must(whole->close());
  }
}

TEST_CASE("rebase: the overlay reads as before over its new backing file") {
  Rng rng(base_seed());
  for (const uint32_t version : {2u, 3u}) {
    for (const uint64_t old_size : {kSize, kSize - 3_MiB + 512}) {
      for (const uint64_t new_size : {uint64_t{0}, kSize - 1_MiB - 1024, kSize + 1_MiB}) {
        CAPTURE(version);
        CAPTURE(old_size);
        CAPTURE(new_size);
        const MemImage old_image = scribbled_image(old_size, rng);
        JobDisk overlay = qcow2_disk({.size = kSize, .version = version, .backing = "base"}, old_image);
        scribble(*overlay, rng, 5);
        const auto expected = content(*overlay);
        const MemImage new_image = new_size == 0 ? MemImage() : scribbled_image(new_size, rng);
        JobDisk new_backing = raw_disk_of(new_image);

        must(prepare_rebase(*overlay, new_size == 0 ? nullptr : &*new_backing));

        CHECK(content(*overlay) == expected);
        must(overlay->flush());
        auto disk = must(open_image(std::make_shared<MemStorage>(overlay.memory->image()),
                                    {.read_only = true, .backing = new_image}));
        CHECK(content(*disk) == expected);
        must(disk->close());
      }
    }
  }
}

TEST_CASE_TEMPLATE("rebase: a crash at any moment leaves an overlay that reads as before over its old backing file",
                   Kind, IMG_EVERY_KIND) {
  Rng rng(base_seed());
  constexpr uint64_t kSmall = 2_MiB;
  const MemImage old_image = scribbled_image(kSmall - 512, rng);
  JobDisk overlay = disk_of(Kind::image({.size = kSmall, .cluster_size = 4096, .backing = "base"}), old_image);
  scribble(*overlay, rng, 5);
  must(overlay->flush());
  const auto expected = content(*overlay);
  const MemImage start = overlay.memory->image();
  auto storage = std::make_shared<CrashStorage>(start);
  Mutex mutex;
  std::vector<MemImage> crashed;
  storage->set_observer([&] {  // by several threads; some of the states are enough
    Lock lock(mutex);
    if (rng.one_in(4)) crashed.push_back(storage->crash(kCrashModes[rng.below(std::size(kCrashModes))], rng));
  });
  auto disk = must(open_image(std::make_shared<OrderStorage>(storage, start), {.backing = old_image}));
  JobDisk new_backing = raw_disk_of(scribbled_image(kSmall + 4096, rng));

  must(prepare_rebase(*disk, &*new_backing));
  must(disk->close());

  REQUIRE(crashed.size() > 5);
  for (const MemImage& image : crashed) {
    REQUIRE(check_image(image).corruptions == 0);
    auto survivor = must(open_image(std::make_shared<MemStorage>(image), {.read_only = true, .backing = old_image}));
    REQUIRE(content(*survivor) == expected);
    must(survivor->close());
  }
}

TEST_CASE("rebase: clusters that read alike are not copied") {
  Rng rng(base_seed());
  const MemImage old_image = scribbled_image(kSize, rng);
  MemImage new_image = old_image;
  new_image.write(1_MiB, pattern(100, 77));
  JobDisk overlay = qcow2_disk({.size = kSize, .backing = "base"}, old_image);
  JobDisk new_backing = raw_disk_of(new_image);

  must(prepare_rebase(*overlay, &*new_backing));

  uint64_t own = 0;
  for (const Extent& extent : must(overlay->map({GuestOffset(0), kSize})))
    if (extent.depth == 0 && extent.kind != ExtentKind::hole) own += extent.range.length;
  CHECK(own == 64_KiB);
}

}  // namespace imgfuse::test
