// What a guest sees of a qcow2 disk, and what its requests leave in the image.
#include <doctest/doctest.h>

#include <algorithm>

#include "base/math.h"
#include "format/qcow2/qcow2_disk.h"
#include "support/builders.h"
#include "support/cold_storage.h"
#include "support/model_disk.h"
#include "support/noted_fetches.h"
#include "support/qcow2_view.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kCluster = 65536;

bool all_zero(const std::vector<std::byte>& bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0}; });
}

std::vector<std::byte> part(const std::vector<std::byte>& bytes, size_t offset, size_t length) {
  const auto begin = bytes.begin() + static_cast<ptrdiff_t>(offset);
  return {begin, begin + static_cast<ptrdiff_t>(length)};
}

MemImage raw_image(const std::vector<std::byte>& content) {
  MemImage image;
  image.write(0, content);
  return image;
}

/// Where a guest cluster lies in the image file.
HostOffset host_of(Disk& disk, uint64_t guest) {
  const auto extents = must(disk.map({GuestOffset(guest), 512}));
  REQUIRE(extents.size() == 1);
  REQUIRE(extents[0].has_host_offset);
  return extents[0].host;
}

void check_sound(const MemImage& image) {
  const CheckReport report = check_image(image);
  CHECK(report.corruptions == 0);
  CHECK(report.check_errors == 0);
  CHECK(ImageView::parse(image)->find_corruption() == "");
}

TEST_CASE_TEMPLATE("a fresh disk reads as zeros and stores nothing", Kind, IMG_EVERY_KIND) {
  const WatchedDisk disk = open_watched(Kind::image());

  CHECK(all_zero(read_all(*disk.disk, GuestOffset(12345), 300000)));

  CHECK(disk.memory->counts().writes == 0);
  must(disk->close());
}

TEST_CASE_TEMPLATE("what was written is there after the image was closed and opened again", Kind, IMG_EVERY_KIND) {
  const auto data = pattern(5_MiB);
  WatchedDisk disk = open_watched(Kind::image());
  must(disk->write(GuestOffset(1_MiB + 777), data));
  must(disk->close());

  const MemImage image = disk.memory->image();
  disk = open_watched(image);
  CHECK(read_all(*disk.disk, GuestOffset(1_MiB + 777), data.size()) == data);
  CHECK(all_zero(read_all(*disk.disk, GuestOffset(1_MiB), 777)));
  CHECK(all_zero(read_all(*disk.disk, GuestOffset(6_MiB + 777), 1_MiB)));
  must(disk->close());
  check_sound(image);
  CHECK(check_image(image).leaks == 0);
}

TEST_CASE_TEMPLATE("a partial write keeps the rest of the cluster as the backing file has it", Kind, IMG_EVERY_KIND) {
  const auto below = pattern(4 * kCluster - 1000, 2);  // ends inside the last cluster
  const auto data = pattern(1000, 3);
  const WatchedDisk disk = open_watched(Kind::image({.size = 4 * kCluster, .backing = "base"}),
                                        {.backing = raw_image(part(below, 0, 3 * kCluster + 512))});

  must(disk->write(GuestOffset(kCluster + 300), data));
  must(disk->write(GuestOffset(3 * kCluster + 2000), data));

  auto expected = part(below, 0, 3 * kCluster + 512);
  expected.resize(4 * kCluster);
  std::copy(data.begin(), data.end(), expected.begin() + kCluster + 300);
  std::copy(data.begin(), data.end(), expected.begin() + 3 * kCluster + 2000);
  CHECK(read_all(*disk.disk, GuestOffset(0), 4 * kCluster) == expected);
  must(disk->close());
  check_sound(disk.memory->image());
}

TEST_CASE_TEMPLATE("overwriting needs no space and, for the flush, one barrier", Kind, IMG_EVERY_KIND) {
  const WatchedDisk disk = open_watched(Kind::image());
  must(disk->write(GuestOffset(0), pattern(1_MiB)));
  must(disk->flush());
  const uint64_t size = must(disk.memory->size());
  disk.memory->counts().reset();

  must(disk->write(GuestOffset(5000), pattern(900000, 9)));
  must(disk->flush());

  CHECK(must(disk.memory->size()) == size);
  CHECK(disk.memory->counts().flushes == 1);
  CHECK(read_all(*disk.disk, GuestOffset(5000), 900000) == pattern(900000, 9));
  must(disk->close());
}

TEST_CASE_TEMPLATE("a discarded range reads as zeros, not as the backing file", Kind, IMG_EVERY_KIND) {
  const auto below = pattern(8 * kCluster);
  const WatchedDisk disk =
      open_watched(Kind::image({.size = 8 * kCluster, .backing = "base"}), {.backing = raw_image(below)});
  must(disk->write(GuestOffset(0), pattern(2 * kCluster, 5)));

  must(disk->discard({GuestOffset(kCluster), 3 * kCluster}));

  CHECK(all_zero(read_all(*disk.disk, GuestOffset(kCluster), 3 * kCluster)));
  CHECK(read_all(*disk.disk, GuestOffset(4 * kCluster), 4 * kCluster) == part(below, 4 * kCluster, 4 * kCluster));
  must(disk->close());
  check_sound(disk.memory->image());
}

TEST_CASE_TEMPLATE("a discard leaves the clusters alone that it covers in part", Kind, IMG_EVERY_KIND) {
  const auto data = pattern(3 * kCluster);
  const WatchedDisk disk = open_watched(Kind::image());
  must(disk->write(GuestOffset(0), data));

  must(disk->discard({GuestOffset(100), 2 * kCluster}));

  const DiskInfo info = disk->info();  // FVD discards sectors
  const uint64_t unit = info.subcluster_size != 0 ? info.subcluster_size : info.cluster_size;
  const uint64_t begin = round_up(100, unit), end = round_down(100 + 2 * kCluster, unit);
  CHECK(read_all(*disk.disk, GuestOffset(0), begin) == part(data, 0, begin));
  CHECK(all_zero(read_all(*disk.disk, GuestOffset(begin), end - begin)));
  CHECK(read_all(*disk.disk, GuestOffset(end), data.size() - end) == part(data, end, data.size() - end));
  must(disk->close());
}

TEST_CASE("qcow2: a read that does not want to wait does not end writing, whatever it has seen of damage") {
  auto memory = std::make_shared<MemStorage>(make_qcow2({.size = 1_GiB}));
  auto storage = std::make_shared<ColdStorage>(memory);
  {
    auto disk = must(open_qcow2(memory));
    must(disk->write(GuestOffset(0), pattern(2 * kCluster)));
    must(disk->write(GuestOffset(512_MiB), pattern(512)));
    must(disk->close());
  }
  // The second cluster is behind the first one, and another table.
  const auto references = Qcow2View::parse(memory->image())->references();
  const auto cluster_of = [&](Owner::Kind kind, uint64_t index) {
    const auto owned = [&](const Reference& r) { return r.owner.kind == kind && r.owner.index == index; };
    return std::find_if(references.begin(), references.end(), owned)->cluster;
  };
  const uint64_t other = cluster_of(Owner::Kind::l2_table, 1);
  const be<uint64_t> entries[] = {be<uint64_t>((other - 1) * kCluster | uint64_t{1} << 63),
                                  be<uint64_t>(other * kCluster | uint64_t{1} << 63)};
  must(memory->write(HostOffset(cluster_of(Owner::Kind::l2_table, 0) * kCluster), std::as_bytes(std::span(entries))));
  auto disk = must(open_qcow2(storage));
  (void)read_all(*disk, GuestOffset(0), 512);  // the table is in memory now
  CHECK(would_wait(read_in_a_hurry(*disk, {GuestOffset(0), 2 * kCluster})));
  must(disk->write(GuestOffset(0), pattern(512, 2)));
  must(disk->flush());
  std::vector<std::byte> bytes(512);
  CHECK_FALSE(disk->read(GuestOffset(kCluster), bytes));
  CHECK_FALSE(disk->write(GuestOffset(0), pattern(512, 3)));
  CHECK_FALSE(disk->close());
}

TEST_CASE("qcow2: a discard gives host space back with the next flush") {
  const WatchedDisk disk = open_watched(make_qcow2({}));
  must(disk->write(GuestOffset(0), pattern(1_MiB)));
  must(disk->flush());
  const uint64_t before = must(disk.memory->allocated());

  must(disk->discard({GuestOffset(0), 1_MiB}));
  CHECK(must(disk.memory->allocated()) == before);
  must(disk->flush());

  CHECK(must(disk.memory->allocated()) <= before - 1_MiB);
  must(disk->close());
  CHECK(check_image(disk.memory->image()).leaks == 0);
}

TEST_CASE("qcow2: a discarded cluster is not reused before the next flush") {
  const WatchedDisk disk = open_watched(make_qcow2({}));
  must(disk->write(GuestOffset(0), pattern(kCluster)));
  must(disk->flush());
  const HostOffset first = host_of(*disk.disk, 0);

  must(disk->discard({GuestOffset(0), kCluster}));
  must(disk->write(GuestOffset(10 * kCluster), pattern(kCluster, 2)));
  CHECK(host_of(*disk.disk, 10 * kCluster) != first);
  must(disk->flush());
  must(disk->write(GuestOffset(20 * kCluster), pattern(kCluster, 3)));

  CHECK(host_of(*disk.disk, 20 * kCluster) == first);
  CHECK(read_all(*disk.disk, GuestOffset(10 * kCluster), kCluster) == pattern(kCluster, 2));
  must(disk->close());
}

TEST_CASE("qcow2: a reused cluster shows nothing of what it held") {
  const WatchedDisk disk = open_watched(make_qcow2({}));
  must(disk->write(GuestOffset(0), pattern(4 * kCluster)));
  must(disk->write_zeroes({GuestOffset(0), kCluster}, Zeroing::keep_allocation));
  must(disk->discard({GuestOffset(kCluster), 3 * kCluster}));
  must(disk->flush());

  must(disk->write(GuestOffset(1000), pattern(100, 2)));              // the same cluster, in place
  must(disk->write(GuestOffset(9 * kCluster + 5), pattern(100, 3)));  // a freed one

  auto expected = std::vector<std::byte>(kCluster);
  const auto first = pattern(100, 2);
  std::copy(first.begin(), first.end(), expected.begin() + 1000);
  CHECK(read_all(*disk.disk, GuestOffset(0), kCluster) == expected);
  expected.assign(kCluster, std::byte{0});
  const auto second = pattern(100, 3);
  std::copy(second.begin(), second.end(), expected.begin() + 5);
  CHECK(read_all(*disk.disk, GuestOffset(9 * kCluster), kCluster) == expected);
  must(disk->close());
  check_sound(disk.memory->image());
}

TEST_CASE("qcow2: zeroing may keep the clusters, and then writing needs no new ones") {
  const WatchedDisk disk = open_watched(make_qcow2({}));
  must(disk->write(GuestOffset(0), pattern(4 * kCluster)));
  const HostOffset host = host_of(*disk.disk, kCluster);
  const uint64_t size = must(disk.memory->size());

  must(disk->write_zeroes({GuestOffset(0), 4 * kCluster}, Zeroing::keep_allocation));
  CHECK(all_zero(read_all(*disk.disk, GuestOffset(0), 4 * kCluster)));
  must(disk->write(GuestOffset(kCluster), pattern(kCluster, 2)));

  CHECK(host_of(*disk.disk, kCluster) == host);
  CHECK(must(disk.memory->size()) == size);
  must(disk->close());
}

TEST_CASE("qcow2: version 2 has no zero clusters, and still a discard does not bring the backing file back") {
  const WatchedDisk disk = open_watched(make_qcow2({.size = 4 * kCluster, .version = 2, .backing = "base"}),
                                        {.backing = raw_image(pattern(4 * kCluster))});

  must(disk->discard({GuestOffset(kCluster), kCluster}));
  must(disk->write_zeroes({GuestOffset(3 * kCluster + 5), 900}, Zeroing::may_free));

  CHECK(all_zero(read_all(*disk.disk, GuestOffset(kCluster), kCluster)));
  CHECK(all_zero(read_all(*disk.disk, GuestOffset(3 * kCluster + 5), 900)));
  CHECK(read_all(*disk.disk, GuestOffset(2 * kCluster), kCluster) ==
        part(pattern(4 * kCluster), 2 * kCluster, kCluster));
  must(disk->close());
  check_sound(disk.memory->image());
}

TEST_CASE_TEMPLATE("populating can keep holes: what has no data below gets no host space", Kind, IMG_EVERY_KIND) {
  MemImage below;
  below.write(2 * kCluster + 1000, pattern(100));
  below.write(4 * kCluster - 10, pattern(20));
  below.resize(6 * kCluster);
  const WatchedDisk disk = open_watched(Kind::image({.size = 8 * kCluster, .backing = "base"}), {.backing = below});
  const auto before = read_all(*disk.disk, GuestOffset(0), 8 * kCluster);

  must(disk->populate({GuestOffset(100), 8 * kCluster - 200}, Holes::keep));

  CHECK(read_all(*disk.disk, GuestOffset(0), 8 * kCluster) == before);
  uint64_t allocated = 0;
  for (const Extent& extent : must(disk->map({GuestOffset(0), 8 * kCluster}))) {
    CHECK(extent.depth == 0);
    if (extent.allocated) allocated += extent.range.length;
  }
  CHECK(allocated == 3 * kCluster);
  must(disk->close());
  check_sound(disk.memory->image());
}

TEST_CASE_TEMPLATE("populating makes a range local and changes nothing of it", Kind, IMG_EVERY_KIND) {
  const auto below = pattern(4 * kCluster);
  const WatchedDisk disk =
      open_watched(Kind::image({.size = 8 * kCluster, .backing = "base"}), {.backing = raw_image(below)});

  must(disk->populate({GuestOffset(100), 6 * kCluster}));

  CHECK(read_all(*disk.disk, GuestOffset(0), 4 * kCluster) == below);
  CHECK(all_zero(read_all(*disk.disk, GuestOffset(4 * kCluster), 4 * kCluster)));
  for (const Extent& extent : must(disk->map({GuestOffset(0), 7 * kCluster}))) {
    CHECK(extent.depth == 0);
    CHECK(extent.allocated);
  }
  must(disk->close());
  check_sound(disk.memory->image());
}

TEST_CASE_TEMPLATE("map tells data, zeros and holes apart, through the chain", Kind, IMG_EVERY_KIND) {
  const WatchedDisk disk =
      open_watched(Kind::image({.size = 8 * kCluster, .backing = "base", .backing_size = 4 * kCluster}),
                   {.backing = raw_image(pattern(4 * kCluster))});
  must(disk->write(GuestOffset(kCluster), pattern(kCluster)));
  must(disk->write_zeroes({GuestOffset(2 * kCluster), kCluster}, Zeroing::may_free));

  const auto extents = must(disk->map({GuestOffset(0), 8 * kCluster}));

  REQUIRE(extents.size() == 5);
  CHECK(extents[0].depth == 1);
  CHECK(extents[0].kind == ExtentKind::data);
  CHECK(extents[1].depth == 0);
  CHECK(extents[1].kind == ExtentKind::data);
  CHECK(extents[1].has_host_offset);
  CHECK(extents[2].depth == 0);
  CHECK(extents[2].kind == ExtentKind::zero);
  CHECK(extents[3].depth == 1);
  CHECK(extents[3].range == GuestRange{GuestOffset(3 * kCluster), kCluster});
  CHECK(extents[4].kind == ExtentKind::hole);
  CHECK(extents[4].range == GuestRange{GuestOffset(4 * kCluster), 4 * kCluster});
  must(disk->close());
}

TEST_CASE_TEMPLATE("what a disk gains by growing reads as zeros, even over a longer backing file", Kind,
                   IMG_EVERY_KIND) {
  const WatchedDisk disk = open_watched(Kind::image({.size = kCluster + 512, .backing = "base"}),
                                        {.backing = raw_image(pattern(8 * kCluster))});

  must(disk->resize(20 * kCluster));

  CHECK(disk->size() == 20 * kCluster);
  CHECK(read_all(*disk.disk, GuestOffset(0), kCluster + 512) == part(pattern(8 * kCluster), 0, kCluster + 512));
  CHECK(all_zero(read_all(*disk.disk, GuestOffset(kCluster + 512), 19 * kCluster - 512)));
  must(disk->close());
  check_sound(disk.memory->image());
}

TEST_CASE("qcow2: growing moves the L1 table where it is too short") {
  WatchedDisk disk = open_watched(make_qcow2({.size = 32_KiB, .cluster_size = 512}));
  must(disk->write(GuestOffset(0), pattern(32_KiB)));

  must(disk->resize(64_MiB));
  must(disk->write(GuestOffset(63_MiB), pattern(100000, 2)));
  must(disk->close());

  const MemImage image = disk.memory->image();
  disk = open_watched(image);
  CHECK(disk->size() == 64_MiB);
  CHECK(read_all(*disk.disk, GuestOffset(0), 32_KiB) == pattern(32_KiB));
  CHECK(read_all(*disk.disk, GuestOffset(63_MiB), 100000) == pattern(100000, 2));
  must(disk->close());
  check_sound(image);
  CHECK(check_image(image).leaks == 0);
}

TEST_CASE("qcow2: shrinking and crooked sizes are refused and change nothing") {
  const MemImage image = make_qcow2({});
  const WatchedDisk disk = open_watched(image);

  CHECK(disk->resize(1_MiB).error().code() == ErrorCode::unsupported);
  CHECK(disk->resize(64_MiB + 100).error().code() == ErrorCode::invalid);

  CHECK(disk->size() == 64_MiB);
  CHECK(disk.memory->counts().writes == 0);
  must(disk->close());
}

TEST_CASE_TEMPLATE("a disk open read-only never touches its file", Kind, IMG_EVERY_KIND) {
  WatchedDisk disk = open_watched(Kind::image());
  must(disk->write(GuestOffset(0), pattern(kCluster)));
  must(disk->close());

  disk = open_watched(disk.memory->image(), {.read_only = true});
  CHECK(read_all(*disk.disk, GuestOffset(0), kCluster) == pattern(kCluster));
  CHECK(disk->write(GuestOffset(0), pattern(10)).error().code() == ErrorCode::read_only);
  CHECK(disk->discard({GuestOffset(0), kCluster}).error().code() == ErrorCode::read_only);
  CHECK(disk->resize(1_GiB).error().code() == ErrorCode::read_only);
  must(disk->flush());
  must(disk->close());

  CHECK(disk.memory->counts().writes == 0);
  CHECK(disk.memory->counts().flushes == 0);
}

TEST_CASE_TEMPLATE("requests past the end are refused", Kind, IMG_EVERY_KIND) {
  const WatchedDisk disk = open_watched(Kind::image({.size = kCluster}));
  std::vector<std::byte> bytes(1000);

  CHECK(disk->read(GuestOffset(kCluster - 999), bytes).error().code() == ErrorCode::invalid);
  CHECK(disk->write(GuestOffset(kCluster - 999), bytes).error().code() == ErrorCode::invalid);
  CHECK(disk->write_zeroes({GuestOffset(~uint64_t{0} - 10), 512}, Zeroing::may_free).error().code() ==
        ErrorCode::invalid);
  must(disk->close());
}

TEST_CASE("qcow2: autoclear bits are durably gone before anything else changes") {
  MemImage image = make_qcow2({});
  image.write(95, std::array{std::byte{0x07}});  // bitmaps, a raw data file where there is none, an unknown one

  WatchedDisk disk = open_watched(image, {.read_only = true});
  CHECK(disk.memory->counts().writes == 0);
  must(disk->close());
  disk = open_watched(image);

  std::array<std::byte, 8> bits;
  disk.memory->image().read(88, bits);
  CHECK(bits == std::array<std::byte, 8>{});
  CHECK(disk.memory->counts().flushes == 1);
  must(disk->close());
}

TEST_CASE("qcow2: clusters shared with a snapshot are copied, with their table, before they change") {
  WatchedDisk disk = open_watched(make_qcow2({}));
  const auto old = pattern(4 * kCluster);
  must(disk->write(GuestOffset(0), old));
  must(disk->close());
  const std::optional<MemImage> image = with_snapshot(disk.memory->image());
  if (!image) return;

  disk = open_watched(*image);  // which stops any write to a shared cluster
  must(disk->write(GuestOffset(100), pattern(1000, 2)));
  must(disk->discard({GuestOffset(kCluster), kCluster}));
  must(disk->write_zeroes({GuestOffset(2 * kCluster), 512}, Zeroing::keep_allocation));

  auto expected = old;
  const auto data = pattern(1000, 2);
  std::copy(data.begin(), data.end(), expected.begin() + 100);
  std::fill_n(expected.begin() + kCluster, kCluster, std::byte{0});
  std::fill_n(expected.begin() + 2 * kCluster, 512, std::byte{0});
  CHECK(read_all(*disk.disk, GuestOffset(0), 4 * kCluster) == expected);
  must(disk->close());
  check_sound(disk.memory->image());
  CHECK(check_image(disk.memory->image()).leaks == 0);
}

TEST_CASE("qcow2: the refcount table grows when the file outgrows it") {
  const MemImage image = make_qcow2({.size = 16_MiB, .cluster_size = 512, .refcount_bits = 64});
  const uint64_t table_before = Qcow2View::parse(image)->refcount_table();
  const WatchedDisk disk = open_watched(image);

  must(disk->write(GuestOffset(0), pattern(6_MiB)));
  must(disk->flush());

  CHECK(Qcow2View::parse(disk.memory->image())->refcount_table() != table_before);
  CHECK(read_all(*disk.disk, GuestOffset(0), 6_MiB) == pattern(6_MiB));
  must(disk->close());
  check_sound(disk.memory->image());
  CHECK(check_image(disk.memory->image()).leaks == 0);
}

TEST_CASE("qcow2: the metadata cache keeps its bound under random I/O over a huge disk") {
  const MemImage image = make_qcow2({.size = 1_TiB});
  auto memory = std::make_shared<MemStorage>(image);
  auto disk = must(open_qcow2(memory, {.metadata_cache = 1_MiB}));
  Rng rng(base_seed());

  uint64_t most = 0;
  for (int i = 0; i < 3000; ++i) {
    must(disk->write(GuestOffset(rng.below(1_TiB / 4096) * 4096), pattern(512, rng.next())));
    most = std::max(most, disk->statistics().tables);
  }

  CHECK(most * 4096 <= 1_MiB + 64_KiB);
  must(disk->close());
  check_sound(memory->image());
}

TEST_CASE("qcow2: 1 TiB of virtual disk opens with few reads") {
  auto memory = std::make_shared<MemStorage>(make_qcow2({.size = 1_TiB}));
  memory->counts().reset();
  auto disk = must(open_qcow2(memory));

  CHECK(memory->counts().reads <= 8);
  CHECK(memory->counts().bytes_read <= 1_MiB);
  must(disk->close());
}

TEST_CASE_TEMPLATE("random requests leave what the model says", Kind, IMG_EVERY_KIND) {
  const uint64_t runs = from_environment("IMG_RUNS", 40);
  for (uint64_t run = 0; run < runs; ++run) {
    const uint64_t seed = base_seed() + run;
    CAPTURE(seed);
    Rng rng(seed);
    const uint32_t cluster_size = std::max(Kind::kSmallestCluster, 512u << rng.below(8) << (rng.one_in(8) ? 5 : 0));
    CAPTURE(cluster_size);
    const uint64_t size = std::min<uint64_t>(uint64_t{cluster_size} * cluster_size / 3, 1_GiB) / 512 * 512;
    const auto windows = windows_for(size, cluster_size, cluster_size <= 65536 ? 12 : 3);
    MemImage content;
    std::optional<std::string> backing;
    if (rng.one_in(2)) {
      backing = "base";
      for (const GuestRange window : windows) content.write(window.begin.bytes(), pattern(window.length / 2, seed));
    }
    WatchedDisk disk = open_watched(Kind::any_image({size, cluster_size, backing}, rng), {.backing = content});
    ModelDisk model(size, windows, content);
    const Workload workload{.cluster_size = cluster_size, .growth = true};

    std::string request;
    for (int i = 0; i < 150; ++i) {
      if (rng.one_in(60)) {
        must(disk->close());
        disk = open_watched(disk.memory->image(), {.metadata_cache = 64_KiB, .backing = content});
      }
      const Result<> result = random_request(*disk.disk, model, workload, rng, request);
      CAPTURE(request);
      if (!result) FAIL(result.error().text());
      if (i % 10 == 0) REQUIRE(model.compare_exactly(*disk.disk) == "");
    }
    REQUIRE(model.compare_exactly(*disk.disk) == "");
    must(disk->close());
    check_sound(disk.memory->image());
    CHECK(check_image(disk.memory->image()).leaks == 0);
  }
}

}  // namespace
}  // namespace imgfuse::test
