#include <cstring>
#include <thread>

#include "format/raw/raw.h"
#include "storage/file_storage.h"
#include "support/fault_storage.h"
#include "support/mem_storage.h"
#include "support/must.h"
#include "support/random.h"
#include "unit/storage/host.h"

namespace imgfuse::test {
namespace {

using namespace std::string_view_literals;

/// Closes the disk at the end of a test.
class OpenRaw {
 public:
  explicit OpenRaw(std::shared_ptr<Storage> storage, raw::OpenParameters parameters = {})
      : disk_(must(raw::open(std::move(storage), parameters))) {}
  ~OpenRaw() { (void)disk_->close(); }
  OpenRaw(const OpenRaw&) = delete;
  OpenRaw& operator=(const OpenRaw&) = delete;
  Disk* operator->() { return disk_.get(); }

 private:
  std::unique_ptr<Disk> disk_;
};

std::shared_ptr<MemStorage> make_storage(ConstBytes content) {
  MemImage image;
  image.write(0, content);
  return std::make_shared<MemStorage>(image);
}

std::vector<std::byte> content_of(const MemStorage& storage) {
  const MemImage image = storage.image();
  std::vector<std::byte> out(image.size());
  image.read(0, out);
  return out;
}

ConstBytes bytes_of(std::string_view text) { return std::as_bytes(std::span(text)); }

/// A host that gives nothing back and does not say so.
class NoDiscard final : public InterceptedStorage {
 public:
  using InterceptedStorage::InterceptedStorage;
  Result<> discard(HostRange) override { return {}; }
  Result<StorageExtent> extent(HostRange range) override { return StorageExtent{range.length, true}; }
};

}  // namespace

TEST_CASE("raw: guest bytes are host bytes, and the size is exact") {
  auto storage = make_storage(pattern(10001));
  OpenRaw disk(storage);

  CHECK(disk->size() == 10001);
  CHECK(disk->info().format == "raw");
  std::vector<std::byte> out(10001);
  must(disk->read(GuestOffset(0), out));
  CHECK(out == pattern(10001));
  must(disk->write(GuestOffset(10000), bytes_of("x")));
  CHECK(content_of(*storage).back() == std::byte{'x'});
  CHECK(content_of(*storage).size() == 10001);
  CHECK(!disk->write(GuestOffset(10001), bytes_of("x")));
}

TEST_CASE("raw: a read-only disk refuses every change") {
  OpenRaw disk(make_storage(pattern(8192)), {.read_only = true});

  for (const Result<>& result : {disk->write(GuestOffset(0), bytes_of("x")), disk->discard({GuestOffset(0), 8192}),
                                 disk->write_zeroes({GuestOffset(0), 1}, Zeroing::keep_allocation),
                                 disk->populate({GuestOffset(0), 1}), disk->resize(10000)}) {
    REQUIRE(!result);
    CHECK(result.error().code() == ErrorCode::read_only);
  }
}

TEST_CASE("raw: zeroing that may free gives host space back and reads as zeros, whatever the host can do") {
  auto punching = make_storage(pattern(1 << 20));
  auto rigid = make_storage(pattern(1 << 20));
  const uint64_t before = must(punching->allocated());
  for (const bool can_punch : {true, false}) {
    CAPTURE(can_punch);
    OpenRaw disk(can_punch ? std::shared_ptr<Storage>(punching) : std::make_shared<NoDiscard>(rigid));
    must(disk->write_zeroes({GuestOffset(100), 500000}, Zeroing::may_free));

    auto expected = pattern(1 << 20);
    std::fill_n(expected.begin() + 100, 500000, std::byte{0});
    CHECK(content_of(can_punch ? *punching : *rigid) == expected);
  }
  CHECK(must(punching->allocated()) < before);
}

TEST_CASE("raw: a discard frees whole 4 KiB units and leaves the rest alone") {
  auto storage = make_storage(pattern(20000));
  OpenRaw disk(storage);

  must(disk->discard({GuestOffset(4000), 12000}));

  auto expected = pattern(20000);
  std::fill(expected.begin() + 4096, expected.begin() + 12288, std::byte{0});
  CHECK(content_of(*storage) == expected);
}

TEST_CASE("raw: holes are zeros of this layer, with an offset, as qemu-img says") {
  auto storage = make_storage({});
  must(storage->resize(64_KiB));
  must(storage->write(HostOffset(16_KiB), pattern(8192)));
  OpenRaw disk(storage);

  const std::vector<Extent> extents = must(disk->map({GuestOffset(0), 64_KiB}));

  REQUIRE(extents.size() == 3);
  CHECK(extents[0].kind == ExtentKind::zero);
  CHECK(extents[0].range == GuestRange{GuestOffset(0), 16_KiB});
  CHECK(!extents[0].allocated);
  CHECK(extents[0].has_host_offset);
  CHECK(extents[1].kind == ExtentKind::data);
  CHECK(extents[1].allocated);
  CHECK(extents[1].host == HostOffset(16_KiB));
  CHECK(extents[1].range.length == 8_KiB);
  CHECK(extents[2].range.end() == GuestOffset(64_KiB));
  CHECK(must(disk->map({GuestOffset(0), 64_KiB}, 2)).size() == 2);
}

TEST_CASE("raw: a disk grows, and shrinks when that is asked for") {
  auto storage = make_storage(pattern(5000));
  OpenRaw disk(storage);

  must(disk->resize(9000));
  CHECK(disk->size() == 9000);
  must(disk->write(GuestOffset(8999), bytes_of("x")));
  const auto shrunk = disk->resize(8999);
  REQUIRE(!shrunk);
  CHECK(shrunk.error().code() == ErrorCode::unsupported);
  CHECK(disk->size() == 9000);

  must(disk->resize(512, {.shrink = true}));
  CHECK(disk->size() == 512);
  must(disk->resize(1024, {.preallocation = Preallocation::full}));
  CHECK(disk->resize(2048, {.preallocation = Preallocation::metadata}).error().code() == ErrorCode::invalid);
  std::vector<std::byte> added(512, std::byte{1});
  must(disk->read(GuestOffset(512), added));
  CHECK(added == std::vector<std::byte>(512));
}

TEST_CASE("raw: after a failed flush writes and flushes fail, reads go on") {
  auto storage = std::make_shared<FaultStorage>(make_storage(pattern(5000)));
  OpenRaw disk(storage);
  storage->fail_call(1, ErrorCode::io, {Call::flush});

  const auto first = disk->flush();
  storage->heal();

  REQUIRE(!first);
  for (const Result<>& later :
       {disk->flush(), disk->write(GuestOffset(0), bytes_of("x")), disk->discard({GuestOffset(0), 4096}),
        disk->populate({GuestOffset(0), 1}), disk->resize(6000)}) {
    REQUIRE(!later);
    CHECK(later.error().text() == first.error().text());
  }
  std::vector<std::byte> out(5000);
  must(disk->read(GuestOffset(0), out));
  CHECK(out == pattern(5000));
  CHECK(!disk->close());
}

TEST_CASE("raw: a failed write is told and does not end the disk") {
  auto storage = std::make_shared<FaultStorage>(make_storage(pattern(5000)));
  OpenRaw disk(storage);
  storage->fail_call(1, ErrorCode::no_space, {Call::write});

  const auto write = disk->write(GuestOffset(0), bytes_of("x"));

  REQUIRE(!write);
  CHECK(write.error().code() == ErrorCode::no_space);
  must(disk->write(GuestOffset(0), bytes_of("x")));
  must(disk->flush());
}

TEST_CASE("raw: a probed disk cannot be made to look like another format") {
  const std::vector<std::string_view> heads{
      "QFI\xfb\0\0\0\3"sv, "QFI\xfb\0\0\0\1"sv,      "QED\0"sv, "KDMV"sv, "COWD"sv, "vhdxfile"sv, "conectix"sv,
      "LUKS\xba\xbe"sv,    "# Disk DescriptorFile"sv};
  for (const std::string_view head : heads) {
    CAPTURE(std::string(head));
    auto storage = make_storage(std::vector<std::byte>(8192, std::byte{0xff}));
    OpenRaw probed(storage, {.probed = true});

    std::vector<std::byte> data = pattern(4096);
    std::copy(bytes_of(head).begin(), bytes_of(head).end(), data.begin());
    const auto whole = probed->write(GuestOffset(0), data);
    REQUIRE(!whole);
    CHECK(whole.error().code() == ErrorCode::denied);
    CHECK(whole.error().text().find("--format raw") != std::string::npos);
    CHECK(content_of(*storage) == std::vector<std::byte>(8192, std::byte{0xff}));

    // In two halves: the second makes it.
    must(probed->write(GuestOffset(1), bytes_of(head).subspan(1)));
    CHECK(!probed->write(GuestOffset(0), bytes_of(head).first(1)));
    must(probed->write(GuestOffset(0), bytes_of("\xEB\x3C\x90"sv)));  // a boot sector's jump
    must(probed->write(GuestOffset(512), data));

    OpenRaw given(storage);
    must(given->write(GuestOffset(0), data));
  }
}

TEST_CASE("raw: a probed disk cannot be zeroed into another format") {
  auto storage = make_storage(bytes_of("QED!" + std::string(5000, 'x')));
  OpenRaw disk(storage, {.probed = true});

  CHECK(!disk->write_zeroes({GuestOffset(3), 1}, Zeroing::keep_allocation));
  CHECK(!disk->write_zeroes({GuestOffset(3), 1000}, Zeroing::may_free));
  must(disk->write_zeroes({GuestOffset(0), 5004}, Zeroing::may_free));
}

TEST_CASE("raw: two halves of a magic number written at once do not both arrive") {
  for (int round = 0; round < 50; ++round) {
    auto storage = make_storage(std::vector<std::byte>(4096, std::byte{0xff}));
    OpenRaw disk(storage, {.probed = true});

    std::thread other([&] { (void)disk->write(GuestOffset(0), bytes_of("KD")); });
    (void)disk->write(GuestOffset(2), bytes_of("MV"));
    other.join();

    std::vector<std::byte> head(4);
    must(disk->read(GuestOffset(0), head));
    CHECK(std::memcmp(head.data(), "KDMV", 4) != 0);
  }
}

TEST_CASE("raw: a new image has its size and the space that was asked for") {
  for (const Preallocation preallocation : {Preallocation::off, Preallocation::falloc, Preallocation::full}) {
    const TempDir dir;
    make_file(dir / "new", 0);
    auto storage = must(FileStorage::open(dir / "new", {.writable = true}));
    CreateOptions options;
    options.format = "raw";
    options.size = 3 * 1024 * 1024 + 512;
    options.preallocation = preallocation;

    must(raw::check_create_options(options));
    must(raw::create(*storage, options));

    CHECK(must(storage->size()) == *options.size);
    CHECK(must(storage->allocated()) >= (preallocation == Preallocation::off ? 0 : *options.size));
    CHECK((must(storage->allocated()) == 0) == (preallocation == Preallocation::off));
  }
}

TEST_CASE("raw: options that only qcow2 has are refused") {
  CreateOptions options;
  options.size = 1_MiB;
  must(raw::check_create_options(options));

  options.preallocation = Preallocation::metadata;
  CHECK(!raw::check_create_options(options));
  options.preallocation = Preallocation::off;
  options.backing_file = "base.raw";
  CHECK(!raw::check_create_options(options));
}

}  // namespace imgfuse::test
