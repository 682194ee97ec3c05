// External data files: where bytes lie, what a raw one promises, and that they are durable before anything says so.
#include "format/qcow2/data_file.h"

#include <doctest/doctest.h>

#include "base/log.h"
#include "bytes.h"
#include "faults.h"
#include "imgfuse/bitmaps.h"
#include "imgfuse/snapshots.h"
#include "qemu.h"
#include "support/builders.h"
#include "support/fault_storage.h"
#include "support/gate_storage.h"
#include "support/order_storage.h"
#include "support/qcow2_view.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kCluster = 65536;
constexpr uint64_t kSize = 2_MiB + 512;  // ends inside a cluster
constexpr GuestRange kAll{GuestOffset(0), kSize};
constexpr uint64_t kAutoclear = 88;
constexpr uint64_t kRawBit = 2;

enum class Kind { plain, raw };

MemImage empty_image(Kind kind, bool extended_l2 = false, uint64_t size = kSize) {
  Qcow2Spec spec{.size = size, .cluster_size = kCluster};
  spec.extended_l2 = extended_l2;
  spec.data_file = true;
  spec.data_file_raw = kind == Kind::raw;
  return make_qcow2(spec);
}

MemImage hole(uint64_t size = kSize) {
  MemImage image;
  image.resize(size);
  return image;
}

/// A disk whose image is watched, and its data file.
struct DataDisk {
  explicit DataDisk(const MemImage& first, MemImage content = hole(), OpenSpec spec = {})
      : data(std::make_shared<MemStorage>(std::move(content))) {
    spec.data = data;
    watched = open_watched(first, spec);
  }
  Disk* operator->() const { return watched.disk.get(); }
  std::vector<std::byte> read(GuestRange range = kAll) { return read_all(*watched.disk, range.begin, range.length); }
  std::vector<std::byte> raw(GuestRange range = kAll) { return read_all_of(data->image(), range); }
  static std::vector<std::byte> read_all_of(const MemImage& image, GuestRange range) {
    std::vector<std::byte> bytes(range.length);
    image.read(range.begin.bytes(), bytes);
    return bytes;
  }
  /// The image must be whole, without leaks.
  MemImage close() {
    must(watched->close());
    const MemImage image = watched.memory->image();
    CHECK(check_image(image).clean());
    CHECK(Qcow2View::parse(image)->find_corruption() == "");
    return image;
  }

  std::shared_ptr<MemStorage> data;
  WatchedDisk watched;
};

std::vector<std::byte> sum(std::vector<std::byte> base, uint64_t at, const std::vector<std::byte>& part) {
  std::copy(part.begin(), part.end(), base.begin() + static_cast<ptrdiff_t>(at));
  return base;
}

std::string error_of(const Result<std::unique_ptr<Disk>>& result) {
  return result ? "it opens" : result.error().text();
}

}  // namespace

TEST_CASE("qcow2 data file: each byte lies at its own offset, and the image holds tables only") {
  for (const Kind kind : {Kind::plain, Kind::raw})
    for (const bool extended : {false, true}) {
      CAPTURE(extended);
      DataDisk disk(empty_image(kind, extended));
      CHECK(disk.read() == std::vector<std::byte>(kSize));

      must(disk->write(GuestOffset(0), pattern(3000, 1)));
      must(disk->write(GuestOffset(1_MiB - 100), pattern(kCluster, 2)));
      must(disk->write(GuestOffset(kSize - 512), pattern(512, 3)));

      const auto expected =
          sum(sum(sum(std::vector<std::byte>(kSize), 0, pattern(3000, 1)), 1_MiB - 100, pattern(kCluster, 2)),
              kSize - 512, pattern(512, 3));
      CHECK(disk.read() == expected);
      CHECK(disk.raw() == expected);
      CHECK(disk.data->image().size() == kSize);
      const auto extents = must(disk->map({GuestOffset(1_MiB), 4096}));
      CHECK(extents.at(0).host == HostOffset(1_MiB));
      CHECK(disk.close().size() < 8 * kCluster);
    }
}

TEST_CASE("qcow2 data file: a raw one reads as the disk does, whatever is done to the disk") {
  for (const bool extended : {false, true}) {
    CAPTURE(extended);
    DataDisk disk(empty_image(Kind::raw, extended));
    must(disk->write(GuestOffset(0), pattern(kSize, 1)));
    auto expected = pattern(kSize, 1);
    const auto zeroed = [&](uint64_t at, uint64_t length) {
      expected = sum(expected, at, std::vector<std::byte>(length));
      CHECK(disk.read() == expected);
      CHECK(disk.raw() == expected);
    };

    must(disk->write_zeroes({GuestOffset(1000), 200000}, Zeroing::keep_allocation));
    zeroed(1000, 200000);
    const uint64_t allocated = disk.data->image().allocated();
    must(disk->write_zeroes({GuestOffset(5 * kCluster + 7), 3 * kCluster}, Zeroing::may_free));
    zeroed(5 * kCluster + 7, 3 * kCluster);
    CHECK(disk.data->image().allocated() < allocated);
    must(disk->discard({GuestOffset(10 * kCluster), 4 * kCluster}));
    zeroed(10 * kCluster, 4 * kCluster);
    must(disk->forget({GuestOffset(20 * kCluster), 2 * kCluster}));
    zeroed(20 * kCluster, 2 * kCluster);
    must(disk->populate(kAll));
    zeroed(0, 0);

    CHECK(peek<uint64_t>(disk.close(), kAutoclear) == kRawBit);
  }
}

TEST_CASE("qcow2 data file: writes to a raw one change no table") {
  DataDisk disk(empty_image(Kind::raw));
  disk.watched.memory->counts().reset();

  must(disk->write(GuestOffset(100), pattern(300000, 1)));
  must(disk->write_zeroes({GuestOffset(0), 5 * kCluster}, Zeroing::may_free));
  must(disk->discard({GuestOffset(0), kSize}));
  must(disk->flush());

  CHECK(disk.watched.memory->counts().writes == 0);
  disk.close();
}

TEST_CASE("qcow2 data file: a raw image in which others left zero entries stays in step") {
  if (!have_qemu()) return;
  const MemImage image = made_by(
      "qemu-img create -f qcow2 -o data_file={}.data,data_file_raw=on {} 2097664 && qemu-io -f qcow2 "
      "-c 'write -z 0 192k' -c 'write -z -u 256k 192k' {}");
  for (const uint64_t at : {uint64_t{100}, uint64_t{kCluster + 5}, uint64_t{256_KiB + 77}}) {
    DataDisk disk(image);
    std::vector<std::byte> first(kSize);

    must(disk->write(GuestOffset(at), pattern(3000, 1)));

    CHECK(disk.read() == sum(first, at, pattern(3000, 1)));
    CHECK(disk.raw() == disk.read());
    must(disk->populate(kAll));
    disk.close();
    CHECK(disk.raw() == sum(first, at, pattern(3000, 1)));
  }
}

TEST_CASE("qcow2 data file: old bytes in it are never shown") {
  MemImage old;
  old.write(0, pattern(kSize, 9));
  for (const bool extended : {false, true}) {
    CAPTURE(extended);
    DataDisk disk(empty_image(Kind::plain, extended), old);

    must(disk->write(GuestOffset(kCluster + 1000), pattern(100, 1)));
    must(disk->resize(kSize + kCluster));

    auto expected = sum(std::vector<std::byte>(kSize + kCluster), kCluster + 1000, pattern(100, 1));
    CHECK(disk.read({GuestOffset(0), kSize + kCluster}) == expected);
    disk.close();
  }
}

TEST_CASE("qcow2 data file: it grows and shrinks with the disk, and what is gained reads as zeros") {
  for (const Kind kind : {Kind::plain, Kind::raw})
    for (const Preallocation preallocation :
         {Preallocation::off, Preallocation::metadata, Preallocation::falloc, Preallocation::full}) {
      MemImage longer;
      longer.write(0, std::vector<std::byte>(kSize));
      longer.write(kSize, pattern(100000, 9));  // behind the disk's end
      DataDisk disk(empty_image(kind), longer);
      must(disk->write(GuestOffset(0), pattern(kSize, 1)));

      must(disk->resize(3_MiB + 1024, {.preallocation = preallocation}));
      CHECK(disk.data->image().size() == 3_MiB + 1024);
      auto expected = pattern(kSize, 1);
      expected.resize(3_MiB + 1024);
      const GuestRange all{GuestOffset(0), expected.size()};
      CHECK(disk.read(all) == expected);
      if (kind == Kind::raw) CHECK(disk.raw(all) == expected);
      must(disk->write(GuestOffset(3_MiB), pattern(1024, 2)));

      must(disk->resize(1_MiB + 512, {.shrink = true}));
      CHECK(disk.data->image().size() == 1_MiB + 512);
      must(disk->resize(3_MiB));
      expected = pattern(kSize, 1);
      expected.resize(1_MiB + 512);
      expected.resize(3_MiB);
      CHECK(disk.read({GuestOffset(0), 3_MiB}) == expected);
      if (kind == Kind::raw) CHECK(disk.raw({GuestOffset(0), 3_MiB}) == expected);
      disk.close();
    }
}

TEST_CASE("qcow2 data file: an overlay that forgets gives the file's space back, after its entries") {
  MemImage backing;
  backing.write(0, pattern(kSize, 5));
  Qcow2Spec spec{.size = kSize, .backing = "base"};
  spec.data_file = true;
  DataDisk disk(make_qcow2(spec), hole(), {.backing = backing});
  must(disk->write(GuestOffset(0), pattern(kSize, 1)));
  must(disk->flush());

  must(disk->forget(kAll));

  CHECK(disk.read() == pattern(kSize, 5));
  CHECK(disk.data->image().allocated() <= MemImage::kPageSize);  // the last one is not whole
  disk.close();
}

TEST_CASE("qcow2 data file: the raw bit goes where a backing file shows") {
  MemImage image = make_qcow2({.size = kSize, .backing = "base"});
  poke<uint64_t>(image, 72, 4);
  poke<uint64_t>(image, kAutoclear, kRawBit);
  DataDisk disk(image);

  CHECK(peek<uint64_t>(disk.close(), kAutoclear) == 0);
}

TEST_CASE("qcow2 data file: bitmaps record what is written there") {
  for (const Kind kind : {Kind::plain, Kind::raw}) {
    DataDisk disk(empty_image(kind));
    must(disk->bitmaps()->add("b", kCluster));
    must(disk->write(GuestOffset(5 * kCluster + 100), pattern(100, 1)));
    must(disk->discard({GuestOffset(9 * kCluster), kCluster}));
    const std::vector<GuestRange> expected = {{GuestOffset(5 * kCluster), kCluster},
                                              {GuestOffset(9 * kCluster), kCluster}};
    CHECK(must(disk->bitmaps()->changed("b", kAll)) == expected);
    const MemImage closed = disk.close();
    CHECK(peek<uint64_t>(closed, kAutoclear) == (kind == Kind::raw ? kRawBit | 1 : 1));

    DataDisk again(closed, disk.data->image());
    CHECK(must(again->bitmaps()->changed("b", kAll)) == expected);
    again.close();
  }
}

TEST_CASE("qcow2 data file: snapshots and compression are refused, and change nothing") {
  DataDisk disk(empty_image(Kind::plain));
  const auto created = disk->snapshots()->create("s");
  REQUIRE(!created);
  CHECK(created.error().text() == "an image with an external data file cannot have snapshots");
  disk.close();

  const auto memory = std::make_shared<MemStorage>(empty_image(Kind::plain));
  const OpenSpec compressing{.compress = "zlib", .data = std::make_shared<MemStorage>(hole())};
  CHECK(error_of(open_qcow2(memory, compressing)) == "an image with an external data file has no compressed clusters");
  CHECK(error_of(qcow2::open(memory, {.read_only = true, .snapshot = "s"})) != "it opens");
  CHECK(error_of(open_qcow2(memory)) == "no data file is given");
  CHECK(memory->counts().writes == 0);
}

TEST_CASE("qcow2 data file: an entry that names another place than its own is damage, and nothing there is touched") {
  DataDisk disk(empty_image(Kind::plain));
  must(disk->write(GuestOffset(0), pattern(3 * kCluster, 1)));
  MemImage image = disk.close();
  const uint64_t table = peek<uint64_t>(image, peek<uint64_t>(image, 40)) & 0x00fffffffffffe00;
  for (const uint64_t entry : {0x8000000000020000u, 0x20000ul, 0x4000000000000000u}) {
    CAPTURE(entry);
    MemImage damaged = image;
    poke<uint64_t>(damaged, table, entry);
    const auto data = std::make_shared<MemStorage>(disk.data->image());
    auto hostile = must(open_qcow2(std::make_shared<MemStorage>(damaged), {.data = data}));

    CHECK(hostile->write(GuestOffset(100), pattern(100, 2)).error().code() == ErrorCode::corrupt);
    CHECK_FALSE(hostile->close());
    CHECK(DataDisk::read_all_of(data->image(), kAll) == disk.raw());
  }
}

TEST_CASE("qcow2 data file: a repair that changes what is read ends the promise of a raw one") {
  DataDisk disk(empty_image(Kind::raw));
  must(disk->write(GuestOffset(0), pattern(kSize, 1)));
  MemImage image = disk.close();
  const auto l1 = peek<uint64_t>(image, 40);
  poke<uint64_t>(image, l1, 0x8000000000fff000);  // a table that is lost
  MemStorage storage(image);

  must(qcow2::check(storage, Repair::all, {}));

  CHECK(peek<uint64_t>(storage.image(), kAutoclear) == 0);
  CHECK(check_image(storage.image()).clean());
}

TEST_CASE("qcow2 data file: a flush waits for the data file before it writes what points there") {
  const MemImage image = empty_image(Kind::plain);
  const auto memory = std::make_shared<MemStorage>(image);
  const auto gates = std::make_shared<GateStorage>(std::make_shared<MemStorage>(hole()));
  auto disk = must(open_qcow2(memory, {.data = gates}));
  must(disk->write(GuestOffset(0), pattern(3000, 1)));
  must(disk->flush());  // the L2 table is there
  must(disk->write(GuestOffset(1_MiB), pattern(3000, 2)));
  memory->counts().reset();
  const auto gate = gates->hold(Call::flush);

  auto flush = in_background([&] { return disk->flush(); });
  gate->wait_for_arrival();
  CHECK(waits(flush));
  CHECK(memory->counts().writes == 0);
  must(disk->write(GuestOffset(100), pattern(50, 3)));  // in place: nobody waits

  gate->open();
  must(flush.get());
  CHECK(memory->counts().writes > 0);
  must(disk->close());
}

TEST_CASE("qcow2 data file: zeroing and growth wait for a write in flight to the data file") {
  for (const Kind kind : {Kind::plain, Kind::raw}) {
    const auto memory = std::make_shared<MemStorage>(empty_image(kind));
    const auto data = std::make_shared<MemStorage>(hole());
    const auto gates = std::make_shared<GateStorage>(data);
    auto disk = must(open_qcow2(memory, {.data = gates}));
    must(disk->write(GuestOffset(0), pattern(kCluster, 1)));
    const auto gate = gates->hold(Call::write);
    auto write = in_background([&] { return disk->write(GuestOffset(1000), pattern(3000, 2)); });
    gate->wait_for_arrival();

    auto zero = in_background([&] { return disk->write_zeroes({GuestOffset(0), kCluster}, Zeroing::may_free); });
    CHECK(waits(zero));
    auto resize = in_background([&] { return disk->resize(4_MiB); });
    CHECK(waits(resize));

    gate->open();
    must(write.get());
    must(zero.get());
    must(resize.get());
    CHECK(read_all(*disk, GuestOffset(0), kCluster) == std::vector<std::byte>(kCluster));
    must(disk->close());
    CHECK(data->image().size() == 4_MiB);
  }
}

TEST_CASE("qcow2 data file: whatever call fails on either file, nothing acknowledged is lost") {
  constexpr uint64_t kSmall = Situation::kCluster;
  const Operation operations[] = {
      {"allocating write",
       [](Disk& disk, ModelDisk& model) { return write(disk, model, 50 * kSmall + 100, 5 * kSmall, 1); }},
      {"overwrite", [](Disk& disk, ModelDisk& model) { return write(disk, model, 1000, 3 * kSmall, 2); }},
      {"zeroing",
       [](Disk& disk, ModelDisk& model) {
         return zero(disk, model, {GuestOffset(kSmall / 2), 4 * kSmall}, Zeroing::keep_allocation);
       }},
      {"discard",
       [](Disk& disk, ModelDisk& model) {
         return zero(disk, model, {GuestOffset(kSmall), 6 * kSmall}, Zeroing::may_free);
       }},
      {"growth",
       [](Disk& disk, ModelDisk& model) -> Result<> {
         model.grow(Situation::kSize + 3_MiB, 2 * kSmall);
         IMG_TRY(disk.resize(Situation::kSize + 3_MiB));
         model.grown();
         return {};
       }},
  };
  for (const bool raw : {false, true}) {
    CAPTURE(raw);
    Situation s;
    s.raw = raw;
    s.content.resize(s.size);
    s.content.write(0, pattern(8 * kSmall, 7));
    Qcow2Spec spec{.size = s.size, .cluster_size = kSmall};
    spec.data_file = true;
    spec.data_file_raw = raw;
    DataDisk disk(make_qcow2(spec), hole(s.size));
    must(disk->write(GuestOffset(0), pattern(8 * kSmall, 7)));
    s.image = disk.close();
    s.data = disk.data->image();
    for (const Operation& operation : operations) fail_everywhere(s, operation);
  }
}

TEST_CASE("DataFile: nothing is written behind the disk's end, and nothing is read there") {
  MemImage longer;
  longer.write(0, pattern(10000));
  const auto storage = std::make_shared<MemStorage>(longer);
  const auto file = must(qcow2::DataFile::open(storage, 5000));

  must(file->write(HostOffset(4000), std::vector<std::byte>(3000)));
  must(file->write_zeroes({HostOffset(4900), 3000}));
  must(file->discard({HostOffset(4096), 8192}));
  must(file->allocate({HostOffset(0), 50000}));

  auto expected = sum(pattern(10000), 4000, std::vector<std::byte>(1000));
  std::vector<std::byte> bytes(10000);
  storage->image().read(0, bytes);
  CHECK(bytes == expected);
  must(file->read(HostOffset(0), bytes));
  std::fill(expected.begin() + 5000, expected.end(), std::byte{});
  CHECK(bytes == expected);
  CHECK(must(file->size()) == 5000);
  CHECK_FALSE(must(file->extent({HostOffset(5000), 100})).data);

  must(file->resize(8000));
  must(file->read(HostOffset(0), bytes));
  CHECK(bytes == expected);
  CHECK(storage->image().size() == 8000);
}

}  // namespace imgfuse::test
