// Persistent dirty bitmaps: what is recorded, what is stored, and what is never believed.
#include "imgfuse/bitmaps.h"

#include <doctest/doctest.h>

#include "base/log.h"
#include "bytes.h"
#include "format/qcow2/bitmap_directory.h"
#include "imgfuse/snapshots.h"
#include "qemu.h"
#include "support/builders.h"
#include "support/fault_storage.h"
#include "support/order_storage.h"
#include "support/qcow2_view.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kSize = 8_MiB;
constexpr uint64_t kAutoclear = 88;

struct QuietLog {
  QuietLog() {
    set_log_sink([](LogLevel, const std::string&) {});
  }
} const quiet_log;

GuestRange at(uint64_t begin, uint64_t length) { return {GuestOffset(begin), length}; }

std::vector<GuestRange> changed(Disk& disk, const std::string& name = "b") {
  return must(disk.bitmaps()->changed(name, at(0, disk.size())));
}

MemImage empty_image(uint32_t cluster_size = 65536) {
  return make_qcow2({.size = kSize, .cluster_size = cluster_size});
}

/// Closes the disk; the image must be whole, without leaks.
MemImage closed(const WatchedDisk& disk) {
  must(disk.disk->close());
  MemImage image = disk.memory->image();
  const CheckReport report = check_image(image);
  CHECK(report.clean());
  CHECK(Qcow2View::parse(image)->find_corruption() == "");
  return image;
}

/// An image with a bitmap "b" in which 64 KiB at 1 MiB are dirty.
MemImage with_bitmap(uint32_t cluster_size = 65536) {
  const WatchedDisk disk = open_watched(empty_image(cluster_size));
  must(disk->bitmaps()->add("b", 65536));
  must(disk->write(GuestOffset(1_MiB), pattern(4096, 1)));
  return closed(disk);
}

const std::vector<GuestRange> kFirstChange = {at(1_MiB, 65536)};

/// Where the directory of an image begins. Images made here have the extension behind the feature names.
uint64_t directory_of(const MemImage& image) {
  MemStorage storage(image);
  const auto header = must(qcow2::read_header(storage, qcow2::Purpose::info));
  return must(qcow2::read_bitmap_directory(storage, header))->range.begin.bytes();
}

uint32_t flags_of(const MemImage& image) { return peek<uint32_t>(image, directory_of(image) + 12); }

}  // namespace

TEST_CASE("bitmaps: writes, zeroes and discards are recorded, reads and flushes are not") {
  const WatchedDisk disk = open_watched(empty_image());
  must(disk->write(GuestOffset(0), pattern(65536, 1)));
  must(disk->bitmaps()->add("b", 65536));
  (void)read_all(*disk.disk, GuestOffset(0), 4096);
  must(disk->flush());
  CHECK(changed(*disk.disk).empty());

  must(disk->write(GuestOffset(100), pattern(8, 2)));
  must(disk->write_zeroes(at(1_MiB + 512, 65536), Zeroing::keep_allocation));
  must(disk->discard(at(4_MiB, 1_MiB)));
  must(disk->write(GuestOffset(kSize - 512), pattern(512, 3)));

  CHECK(changed(*disk.disk) ==
        std::vector{at(0, 65536), at(1_MiB, 131072), at(4_MiB, 1_MiB), at(kSize - 65536, 65536)});
  CHECK(must(disk->bitmaps()->changed("b", at(4_MiB + 100, 1000))) == std::vector{at(4_MiB + 100, 1000)});
  (void)closed(disk);
}

TEST_CASE("bitmaps: they survive closing and opening, with every cluster size") {
  for (const uint32_t cluster_size : {512u, 4096u, 65536u, 2097152u}) {
    CAPTURE(cluster_size);
    const MemImage image = with_bitmap(cluster_size);
    const WatchedDisk disk = open_watched(image);
    CHECK(changed(*disk.disk) == kFirstChange);
    must(disk->bitmaps()->add("fine", 512));
    must(disk->write(GuestOffset(3_MiB + 512), pattern(512, 1)));

    const MemImage next = closed(disk);

    const auto again = must(open_qcow2(std::make_shared<MemStorage>(next), {.read_only = true}));
    CHECK(changed(*again) == std::vector{at(1_MiB, 65536), at(3_MiB, 65536)});
    CHECK(changed(*again, "fine") == std::vector{at(3_MiB + 512, 512)});
    const auto list = again->bitmaps()->list();
    REQUIRE(list.size() == 2);
    CHECK(list[0].name == "b");
    CHECK(list[1].granularity == 512);
    CHECK(list[1].recording);
    CHECK_FALSE(list[1].in_use);
  }
}

TEST_CASE("bitmaps: an open image says that they are in use, one that was read says nothing") {
  const MemImage image = with_bitmap();
  CHECK(flags_of(image) == qcow2::kBitmapAuto);
  const WatchedDisk disk = open_watched(image);
  CHECK(flags_of(disk.memory->image()) == (qcow2::kBitmapAuto | qcow2::kBitmapInUse));
  CHECK_FALSE(disk->bitmaps()->list()[0].in_use);  // not for the one who has it open
  (void)closed(disk);

  auto memory = std::make_shared<MemStorage>(image);
  const auto reader = must(open_qcow2(memory, {.read_only = true}));
  CHECK(reader->bitmaps()->add("c", 65536).error().code() == ErrorCode::read_only);
  must(reader->close());
  CHECK(memory->counts().writes == 0);
}

TEST_CASE("bitmaps: without a change the same clusters are valid again") {
  const MemImage image = with_bitmap();
  const WatchedDisk disk = open_watched(image);
  must(disk->write(GuestOffset(1_MiB + 4096), pattern(4096, 2)));  // dirty already
  const MemImage next = closed(disk);
  CHECK(directory_of(next) == directory_of(image));
  CHECK(flags_of(next) == qcow2::kBitmapAuto);
}

TEST_CASE("bitmaps: after a crash they are in use, and can only be removed") {
  const WatchedDisk crashed = open_watched(with_bitmap());
  const MemImage left = crashed.memory->image();
  must(crashed->close());

  const WatchedDisk disk = open_watched(left);
  Bitmaps& bitmaps = *disk->bitmaps();
  REQUIRE(bitmaps.list().size() == 1);
  CHECK(bitmaps.list()[0].in_use);
  CHECK(bitmaps.changed("b", at(0, kSize)).error().text() ==
        "bitmap \"b\" is in use or inconsistent: what changed is not known");
  CHECK_FALSE(bitmaps.clear("b"));
  must(disk->write(GuestOffset(0), pattern(512, 1)));
  const MemImage kept = closed(disk);
  CHECK((flags_of(kept) & qcow2::kBitmapInUse) != 0);

  const WatchedDisk last = open_watched(kept);
  must(last->bitmaps()->remove("b"));
  const MemImage without = closed(last);
  CHECK((peek<uint64_t>(without, kAutoclear) & 1) == 0);
  CHECK(must(open_qcow2(std::make_shared<MemStorage>(without), {.read_only = true}))->bitmaps()->list().empty());
}

TEST_CASE("bitmaps: clear starts over, remove forgets") {
  const WatchedDisk disk = open_watched(with_bitmap());
  must(disk->bitmaps()->add("c", 4096));
  must(disk->bitmaps()->clear("b"));
  CHECK(changed(*disk.disk).empty());
  must(disk->write(GuestOffset(5_MiB), pattern(10, 1)));
  must(disk->bitmaps()->remove("c"));
  CHECK(disk->bitmaps()->remove("c").error().code() == ErrorCode::not_found);
  const WatchedDisk again = open_watched(closed(disk));
  CHECK(again->bitmaps()->list().size() == 1);
  CHECK(changed(*again.disk) == std::vector{at(5_MiB, 65536)});
  (void)closed(again);
}

TEST_CASE("bitmaps: what makes no sense is refused") {
  const WatchedDisk disk = open_watched(with_bitmap());
  Bitmaps& bitmaps = *disk->bitmaps();
  CHECK_FALSE(bitmaps.add("b", 65536));
  CHECK_FALSE(bitmaps.add("", 65536));
  CHECK_FALSE(bitmaps.add(std::string(1024, 'x'), 65536));
  CHECK_FALSE(bitmaps.add("new\nline", 65536));
  for (const uint64_t granularity : {uint64_t{0}, uint64_t{256}, uint64_t{65535}, 4_GiB, uint64_t{1} << 63})
    CHECK(bitmaps.add("c", granularity).error().code() == ErrorCode::invalid);
  must(bitmaps.add(std::string(1023, 'x'), 2_GiB));
  (void)closed(disk);

  auto old = must(open_qcow2(std::make_shared<MemStorage>(make_qcow2({.size = kSize, .version = 2}))));
  CHECK(old->bitmaps()->add("b", 65536).error().code() == ErrorCode::unsupported);
  must(old->close());

  auto large = must(open_qcow2(std::make_shared<MemStorage>(make_qcow2({.size = 1024_TiB}))));
  CHECK(large->bitmaps()->add("b", 512).error().code() == ErrorCode::invalid);
  must(large->bitmaps()->add("b", 2_MiB));
  must(large->close());
}

TEST_CASE("bitmaps: they take the size of the disk, and what it gains is dirty") {
  const WatchedDisk disk = open_watched(with_bitmap());
  must(disk->resize(9_MiB + 512));
  CHECK(changed(*disk.disk) == std::vector{at(1_MiB, 65536), at(8_MiB, 1_MiB + 512)});
  must(disk->write(GuestOffset(9_MiB), pattern(512, 1)));
  const WatchedDisk again = open_watched(closed(disk));
  CHECK(changed(*again.disk) == std::vector{at(1_MiB, 65536), at(8_MiB, 1_MiB + 512)});
  (void)closed(again);
}

TEST_CASE("bitmaps: another snapshot's content counts as changed everywhere, a new snapshot changes nothing") {
  const WatchedDisk disk = open_watched(with_bitmap());
  must(disk->snapshots()->create("s"));
  CHECK(changed(*disk.disk) == kFirstChange);
  CHECK(must(disk->snapshots()->open("s"))->bitmaps() == nullptr);
  must(disk->snapshots()->apply("s"));
  CHECK(changed(*disk.disk) == std::vector{at(0, kSize)});
  must(disk->snapshots()->remove("s"));
  (void)closed(disk);
}

TEST_CASE("bitmaps: one that does not record takes the size, too, and is else left alone") {
  MemImage image = with_bitmap();
  poke<uint32_t>(image, directory_of(image) + 12, 0);  // as qemu-img bitmap --disable
  const WatchedDisk disk = open_watched(image);
  CHECK_FALSE(disk->bitmaps()->list()[0].recording);
  must(disk->write(GuestOffset(0), pattern(512, 1)));
  CHECK(changed(*disk.disk) == kFirstChange);
  must(disk->resize(9_MiB));
  CHECK(changed(*disk.disk) == std::vector{at(1_MiB, 65536), at(8_MiB, 1_MiB)});
  const MemImage next = closed(disk);
  CHECK(flags_of(next) == 0);
}

TEST_CASE("bitmaps: when there is no space to store them they are lost, and the image is not") {
  for (const bool full : {true, false}) {
    auto memory = std::make_shared<MemStorage>(with_bitmap());
    auto faults = std::make_shared<FaultStorage>(memory);
    auto disk = must(open_qcow2(faults));
    must(disk->write(GuestOffset(5_MiB), pattern(10, 1)));
    must(disk->flush());
    if (full) faults->fail_call(1, ErrorCode::no_space, {.calls = Call::write | Call::zero});
    must(disk->close());
    const MemImage image = memory->image();
    CHECK(check_image(image).corruptions == 0);
    const auto again = must(open_qcow2(std::make_shared<MemStorage>(image), {.read_only = true}));
    REQUIRE(again->bitmaps()->list().size() == 1);
    CHECK(again->bitmaps()->list()[0].in_use == full);
    CHECK(read_all(*again, GuestOffset(5_MiB), 10) == pattern(10, 1));
  }
}

TEST_CASE("bitmaps: every failing call at opening, adding and closing leaves nothing that is wrong") {
  const MemImage image = with_bitmap();
  for (const bool torn : {false, true})
    for (uint64_t n = 1;; n += fault_step()) {
      CAPTURE(n);
      auto memory = std::make_shared<MemStorage>(image);
      auto faults = std::make_shared<FaultStorage>(std::make_shared<OrderStorage>(memory));
      faults->fail_call(n, ErrorCode::io, {.torn = torn});
      auto disk = open_qcow2(faults);
      if (disk) {
        (void)(*disk)->bitmaps()->add("c", 4096);
        (void)(*disk)->write(GuestOffset(5_MiB), pattern(70000, 1));
        (void)(*disk)->close();
      }
      const MemImage left = memory->image();
      CHECK(check_image(left).corruptions == 0);
      const auto again = must(open_qcow2(std::make_shared<MemStorage>(left)));
      for (const BitmapInfo& info : again->bitmaps()->list()) {
        if (info.in_use) continue;
        const bool written = read_all(*again, GuestOffset(5_MiB), 10) == pattern(10, 1);
        const bool recorded = !must(again->bitmaps()->changed(info.name, at(5_MiB, 65536))).empty();
        CHECK((recorded || !written));
      }
      must(again->close());
      if (!faults->fired()) break;
    }
}

TEST_CASE("bitmaps: a directory that cannot be believed is forgotten by the first writer, and told to readers") {
  const MemImage whole = with_bitmap();
  const uint64_t directory = directory_of(whole);
  const uint64_t table = peek<uint64_t>(whole, directory);
  const uint64_t bits = peek<uint64_t>(whole, table);
  struct Damage {
    const char* what;
    uint64_t offset;
    uint64_t value;
    int width;
  };
  uint64_t extension = 112;
  while (peek<uint32_t>(whole, extension) != 0x23852875)
    extension += 8 + (peek<uint32_t>(whole, extension + 4) + 7) / 8 * 8;
  const Damage damages[] = {
      {"no bitmaps", extension + 8, 0, 4},
      {"65536 bitmaps", extension + 8, 65536, 4},
      {"two bitmaps", extension + 8, 2, 4},
      {"a huge directory", extension + 16, ~uint64_t{0}, 8},
      {"an empty directory", extension + 16, 0, 8},
      {"a directory elsewhere", extension + 24, 1_TiB, 8},
      {"a directory in the header", extension + 24, 0, 8},
      {"a directory on the L1 table", extension + 24, 0x30000, 8},
      {"a table elsewhere", directory, 1_TiB, 8},
      {"a table on the directory", directory, directory, 8},
      {"a table of no place", directory, 512, 8},
      {"a huge table", directory + 8, 0xffffffff, 4},
      {"a long table", directory + 8, 1 << 27, 4},
      {"no name", directory + 18, 0, 2},
      {"a long name", directory + 18, 0xffff, 2},
      {"bits elsewhere", table, 1_TiB, 8},
      {"bits on the L1 table", table, 0x30000, 8},
      {"bits on their table", table, table, 8},
      {"bits with reserved flags", table, bits | 2, 8},
      {"bits in the middle of a cluster", table, bits + 512, 8},
  };
  for (const Damage& damage : damages) {
    CAPTURE(damage.what);
    MemImage image = whole;
    if (damage.width == 8) poke<uint64_t>(image, damage.offset, damage.value);
    if (damage.width == 4) poke<uint32_t>(image, damage.offset, static_cast<uint32_t>(damage.value));
    if (damage.width == 2) poke<uint16_t>(image, damage.offset, static_cast<uint16_t>(damage.value));

    auto reader = must(open_qcow2(std::make_shared<MemStorage>(image), {.read_only = true}));
    for (const BitmapInfo& info : reader->bitmaps()->list()) (void)reader->bitmaps()->changed(info.name, at(0, kSize));
    must(reader->close());

    auto memory = std::make_shared<MemStorage>(image);
    auto disk = must(open_qcow2(memory));
    CHECK(disk->bitmaps()->list().empty());
    CHECK((peek<uint64_t>(memory->image(), kAutoclear) & 1) == 0);
    must(disk->write(GuestOffset(0), pattern(4096, 1)));
    must(disk->close());
    CHECK(check_image(memory->image()).corruptions == 0);
  }
}

TEST_CASE("bitmaps: one that is not understood is in use, the others are kept") {
  const WatchedDisk made = open_watched(with_bitmap());
  must(made->bitmaps()->add("other", 65536));
  const MemImage whole = closed(made);
  const uint64_t directory = directory_of(whole);
  struct Damage {
    const char* what;
    uint64_t offset;
    uint8_t value;
  };
  for (const Damage& damage :
       {Damage{"an unknown flag", 15, 8 | 2}, Damage{"another type", 16, 2}, Damage{"a granularity of 2^200", 17, 200},
        Damage{"a granularity of 2^8", 17, 8}, Damage{"more bits than its table has", 17, 9}}) {
    CAPTURE(damage.what);
    MemImage image = whole;
    if (damage.value == 9) poke<uint64_t>(image, 24, 1024_TiB);
    poke<uint8_t>(image, directory + damage.offset, damage.value);
    if (damage.value == 9) poke<uint64_t>(image, 24, kSize);
    if (damage.value == 9) poke<uint32_t>(image, directory + 8, 2);
    const WatchedDisk disk = open_watched(image);
    const auto list = disk->bitmaps()->list();
    REQUIRE(list.size() == 2);
    CHECK(list[0].in_use);
    CHECK_FALSE(list[1].in_use);
    must(disk->write(GuestOffset(0), pattern(512, 1)));
    must(disk->close());
    CHECK(changed(*must(open_qcow2(std::make_shared<MemStorage>(disk.memory->image()), {.read_only = true})),
                  "other") == std::vector{at(0, 65536)});
  }
}

TEST_CASE("bitmaps: the bit without a directory, and a directory without the bit, mean that there are none") {
  MemImage image = empty_image();
  poke<uint64_t>(image, kAutoclear, 1);
  auto memory = std::make_shared<MemStorage>(image);
  must(must(open_qcow2(memory))->close());
  CHECK(peek<uint64_t>(memory->image(), kAutoclear) == 0);

  image = with_bitmap();
  poke<uint64_t>(image, kAutoclear, 0);
  auto disk = must(open_qcow2(std::make_shared<MemStorage>(image)));
  CHECK(disk->bitmaps()->list().empty());
  must(disk->close());
}

TEST_CASE("bitmaps: unknown autoclear bits go, this one stays") {
  MemImage image = with_bitmap();
  poke<uint64_t>(image, kAutoclear, 1 | 1 << 7);
  const WatchedDisk disk = open_watched(image);
  CHECK(peek<uint64_t>(disk.memory->image(), kAutoclear) == 1);
  (void)closed(disk);
}

TEST_CASE("bitmaps: a repair that changes what the disk holds gives them up") {
  MemImage image = with_bitmap();
  const uint64_t l2 = peek<uint64_t>(image, peek<uint64_t>(image, 40)) & kAddressBits;
  poke<uint64_t>(image, l2 + 16 * 8, peek<uint64_t>(image, l2 + 16 * 8) + 512);
  MemStorage storage(image);

  const CheckReport report = must(qcow2::check(storage, Repair::all, {}));

  CHECK(report.corruptions == 0);
  CHECK((peek<uint64_t>(storage.image(), kAutoclear) & 1) == 0);
}

TEST_CASE("bitmaps: QEMU's bitmaps are kept, and QEMU reads ours") {
  if (!have_qemu()) return;
  const MemImage theirs =
      after_command(empty_image(),
                    "qemu-img bitmap --add {} on && qemu-img bitmap --add --disable -g 4096 {} off && "
                    "qemu-io -f qcow2 -c 'write 2M 4k' {}");
  const WatchedDisk disk = open_watched(theirs);
  CHECK(changed(*disk.disk, "on") == std::vector{at(2_MiB, 65536)});
  CHECK(changed(*disk.disk, "off").empty());
  must(disk->write(GuestOffset(6_MiB), pattern(4096, 1)));
  must(disk->bitmaps()->add("ours", 512));
  must(disk->write(GuestOffset(7_MiB), pattern(512, 1)));
  const MemImage ours = closed(disk);
  CHECK(qemu_check(ours).status == 0);

  // QEMU opens them for writing and stores them again.
  const MemImage back = after_command(ours, "qemu-io -f qcow2 -c 'write 3M 512' {}");
  CHECK(qemu_check(back).status == 0);
  const auto reader = must(open_qcow2(std::make_shared<MemStorage>(back), {.read_only = true}));
  CHECK(changed(*reader, "on") == std::vector{at(2_MiB, 65536), at(3_MiB, 65536), at(6_MiB, 65536), at(7_MiB, 65536)});
  CHECK(changed(*reader, "off").empty());
  CHECK(changed(*reader, "ours") == std::vector{at(3_MiB, 512), at(7_MiB, 512)});
}

}  // namespace imgfuse::test
