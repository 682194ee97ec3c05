#include <doctest/doctest.h>

#include <string>

#include "bytes.h"
#include "format/qcow2/header.h"
#include "qemu.h"
#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/fault_storage.h"

using namespace imgfuse;
using namespace imgfuse::test;

namespace {

MemImage created(const CreateOptions& options) {
  MemStorage storage;
  must(qcow2::create(storage, options));
  return storage.image();
}

qcow2::Header header_of(const MemImage& image) {
  MemStorage storage(image);
  return must(qcow2::read_header(storage, qcow2::Purpose::write));
}

CreateOptions sized(uint64_t size) {
  CreateOptions options;
  options.size = size;
  return options;
}

void check_like_qemu(const MemImage& image) {
  const CheckReport ours = check_image(image);
  CHECK(ours.clean());
  if (!have_qemu()) return;
  const QemuCheck qemu = qemu_check(image);
  INFO(qemu.errors);
  CHECK(qemu.status == 0);
  CHECK(ours.total_clusters == qemu.report.total_clusters);
  CHECK(ours.allocated_clusters == qemu.report.allocated_clusters);
  CHECK(ours.fragmented_clusters == qemu.report.fragmented_clusters);
  CHECK(ours.image_end_offset == qemu.report.image_end_offset);
}

/// A device of fixed size, full of old bytes.
class Device final : public InterceptedStorage {
 public:
  explicit Device(uint64_t size) : InterceptedStorage(std::make_shared<MemStorage>(full_of_noise(size))) {}
  const StorageInfo& info() const override { return info_; }

 private:
  static MemImage full_of_noise(uint64_t size) {
    MemImage image;
    image.write(0, pattern(size));
    return image;
  }
  const StorageInfo info_{.name = "device", .writable = true, .extensible = false};
};

std::string refusal(const CreateOptions& options) {
  const Result<> result = qcow2::check_create_options(options);
  REQUIRE_FALSE(result);
  CHECK(result.error().code() == ErrorCode::invalid);
  MemStorage untouched;
  CHECK_FALSE(qcow2::create(untouched, options));
  CHECK(untouched.image().size() == 0);
  return result.error().text();
}

}  // namespace

TEST_CASE("qcow2 create: every cluster size and refcount width passes check, empty and preallocated") {
  for (uint32_t cluster_bits = 9; cluster_bits <= 21; ++cluster_bits) {
    for (uint32_t order = 0; order <= 6; ++order) {
      for (const Preallocation preallocation : {Preallocation::off, Preallocation::metadata}) {
        CreateOptions options = sized(cluster_bits <= 12 ? 9_MiB + 512 : 300_MiB + 512);
        options.cluster_size = 1u << cluster_bits;
        options.refcount_bits = 1u << order;
        options.preallocation = preallocation;
        CAPTURE(options.cluster_size);
        CAPTURE(options.refcount_bits);
        check_like_qemu(created(options));
      }
    }
  }
}

TEST_CASE("qcow2 create: version 2, any size, and every way to preallocate pass check") {
  for (const uint64_t size : {uint64_t{0}, uint64_t{1}, uint64_t{512}, uint64_t{65536}, 5_MiB + 1, 600_MiB}) {
    for (const Preallocation preallocation :
         {Preallocation::off, Preallocation::metadata, Preallocation::falloc, Preallocation::full}) {
      if (preallocation == Preallocation::full && size > 100_MiB) continue;
      for (const uint32_t version : {2u, 3u}) {
        CreateOptions options = sized(size);
        options.version = version;
        options.preallocation = preallocation;
        CAPTURE(size);
        CAPTURE(version);
        const MemImage image = created(options);
        check_like_qemu(image);
        CHECK(header_of(image).size == (size + 511) / 512 * 512);
      }
    }
  }
}

TEST_CASE("qcow2 create: refcount tables of several clusters pass check") {
  CreateOptions options = sized(60_MiB);
  options.cluster_size = 512;
  options.refcount_bits = 64;
  options.preallocation = Preallocation::metadata;

  const MemImage image = created(options);

  CHECK(header_of(image).refcount_table_clusters > 10);
  check_like_qemu(image);
}

TEST_CASE("qcow2 create: a fresh image has the layout that others make") {
  const MemImage image = created(sized(1_GiB));

  CHECK(peek<uint64_t>(image, 48) == 0x10000);       // refcount table
  CHECK(peek<uint64_t>(image, 0x10000) == 0x20000);  // its block
  CHECK(peek<uint64_t>(image, 40) == 0x30000);       // L1
  CHECK(peek<uint32_t>(image, 36) == 2);
  CHECK(peek<uint64_t>(image, 0x20000) == 0x0001000100010001);
  CHECK(peek<uint32_t>(image, 100) == 112);
  CHECK(peek<uint32_t>(image, 112) == 0x6803f857);  // feature names
  CHECK(image.size() == 0x40000);
}

TEST_CASE("qcow2 create: the feature name table comes with version 3 and clusters that have room for it") {
  const auto has_names = [](uint32_t version, uint32_t cluster_size) {
    CreateOptions options = sized(1_MiB);
    options.version = version;
    options.cluster_size = cluster_size;
    return !header_of(created(options)).extensions.empty();
  };
  CHECK(has_names(3, 65536));
  CHECK(has_names(3, 8192));
  CHECK_FALSE(has_names(3, 4096));
  CHECK_FALSE(has_names(2, 65536));
}

TEST_CASE("qcow2 create: options reach the header") {
  CreateOptions options = sized(1_MiB);
  options.lazy_refcounts = true;
  options.compression_type = "zstd";
  options.backing_file = "../base.qcow2";
  options.backing_format = "qcow2";

  const qcow2::Header header = header_of(created(options));

  CHECK(header.compatible == qcow2::kLazyRefcounts);
  CHECK(header.incompatible == qcow2::kCompressionType);
  CHECK(header.compression == qcow2::Compression::zstd);
  CHECK(header.backing_name == "../base.qcow2");
  CHECK(header.backing_format == "qcow2");
  options.version = 2;
  options.lazy_refcounts = false;
  options.compression_type = "zlib";
  CHECK(header_of(created(options)).backing_format == "qcow2");
}

TEST_CASE("qcow2 create: options that contradict each other or the format are refused before anything is written") {
  CreateOptions options = sized(1_MiB);
  SUBCASE("version") {
    options.version = 4;
    CHECK(refusal(options) == "qcow2 version 4 is neither 2 (compat 0.10) nor 3 (compat 1.1)");
  }
  SUBCASE("cluster size") {
    for (const uint32_t size : {0u, 1u, 256u, 3000u, 4u << 20}) {
      options.cluster_size = size;
      CHECK(refusal(options) == fmt::format("cluster size {} is not a power of two between 512 and 2 MiB", size));
    }
  }
  SUBCASE("refcount bits") {
    for (const uint32_t bits : {0u, 3u, 128u}) {
      options.refcount_bits = bits;
      CHECK(refusal(options) == fmt::format("{} refcount bits are not a power of two between 1 and 64", bits));
    }
  }
  SUBCASE("compression type") {
    options.compression_type = "lzma";
    CHECK(refusal(options) == "compression type lzma is neither zlib nor zstd");
  }
  SUBCASE("version 2 with features of version 3") {
    options.version = 2;
    options.refcount_bits = 8;
    CHECK(refusal(options) == "8 refcount bits need version 3 (compat 1.1); version 2 has 16");
    options.refcount_bits = 16;
    options.lazy_refcounts = true;
    CHECK(refusal(options) == "lazy refcounts need version 3 (compat 1.1)");
    options.lazy_refcounts = false;
    options.compression_type = "zstd";
    CHECK(refusal(options) == "compression type zstd needs version 3 (compat 1.1)");
  }
  SUBCASE("backing file") {
    options.backing_file = "base";
    CHECK(refusal(options) == "the format of backing file base is not given; it is never guessed");
    options.backing_format = "vmdk";
    CHECK(refusal(options) == "backing format \"vmdk\" is none of raw, qcow2, qed and fvd");
    options.backing_format = "raw";
    options.preallocation = Preallocation::metadata;
    CHECK(refusal(options) == "preallocation would hide the backing file; give one of the two, or extended L2 entries");
    options.preallocation = Preallocation::off;
    options.backing_file = "";
    CHECK(refusal(options) == "the backing file name is empty");
    options.backing_file = std::string(1024, 'x');
    CHECK(refusal(options) == "the backing file name of 1024 bytes is longer than 1023");
    options.backing_file.reset();
    CHECK(refusal(options) == "a backing format is given without a backing file");
  }
  SUBCASE("too large") {
    options.cluster_size = 512;
    options.size = 128_GiB + 1;
    CHECK(refusal(options) ==
          "a disk of 137438953473 bytes is too large for cluster size 512, which allows 137438953472");
    options.size = ~uint64_t{0};
    CHECK(refusal(options).find("too large") != std::string::npos);
  }
  SUBCASE("too large to be counted") {
    options.cluster_size = 512;
    options.refcount_bits = 64;
    options.size = 128_GiB;
    options.preallocation = Preallocation::metadata;
    CHECK(refusal(options).find("needs a refcount table of") != std::string::npos);
    options.cluster_size = 2u << 20;
    options.size = uint64_t{1} << 60;
    CHECK(refusal(options).find("host offsets end at 2^56") != std::string::npos);
  }
}

TEST_CASE("qcow2 create: a backing name that does not fit into a small cluster is refused") {
  CreateOptions options = sized(1_MiB);
  options.cluster_size = 512;
  options.backing_file = std::string(400, 'x');
  options.backing_format = "raw";

  const Result<> result = qcow2::check_create_options(options);

  REQUIRE_FALSE(result);
  CHECK(result.error().code() == ErrorCode::no_space);
}

TEST_CASE("qcow2 create: the largest disks are created quickly and small") {
  for (const uint32_t cluster_bits : {9u, 16u, 21u}) {
    CreateOptions options = sized(qcow2::max_virtual_size(cluster_bits));
    options.cluster_size = 1u << cluster_bits;
    const MemImage image = created(options);
    CHECK(image.allocated() < 160_KiB);
    check_like_qemu(image);
  }
}

TEST_CASE("qcow2 create: on a device full of old bytes the new disk reads as zeros") {
  for (const Preallocation preallocation :
       {Preallocation::off, Preallocation::metadata, Preallocation::falloc, Preallocation::full}) {
    auto device = std::make_shared<Device>(4_MiB);
    CreateOptions options = sized(2_MiB);
    options.cluster_size = 4096;
    options.preallocation = preallocation;

    must(qcow2::create(*device, options));

    CHECK(must(qcow2::check(*device, Repair::none, {})).corruptions == 0);
    auto disk = must(open_qcow2(device, {.read_only = true}));
    CHECK(read_all(*disk, GuestOffset(0), 2_MiB) == std::vector<std::byte>(2_MiB));
  }
}

TEST_CASE("qcow2 create: a device that is too small is refused") {
  Device device(1_MiB);
  CreateOptions options = sized(2_MiB);
  options.preallocation = Preallocation::metadata;

  const Result<> result = qcow2::create(device, options);

  REQUIRE_FALSE(result);
  CHECK(result.error().code() == ErrorCode::no_space);
}

TEST_CASE("qcow2 create: after a crash there is the whole image or none") {
  MemImage old = make_qcow2({.size = 8_MiB, .cluster_size = 512, .refcount_bits = 64});
  for (const MemImage& before : {MemImage(), old}) {
    CreateOptions options = sized(1_MiB);
    options.cluster_size = 512;
    options.preallocation = Preallocation::metadata;
    CrashStorage storage(before);
    Rng rng(base_seed());
    uint64_t whole = 0;
    storage.set_observer([&] {
      for (const CrashMode mode : kCrashModes) {
        MemStorage left(storage.crash(mode, rng));
        const auto header = qcow2::read_header(left, qcow2::Purpose::write);
        if (!header) continue;
        // An old image is still whole, or already cleared, before anything else of it is touched.
        CHECK(must(qcow2::check(left, Repair::none, {})).clean());
        whole += header->size == 1_MiB;
      }
    });

    must(qcow2::create(storage, options));

    CHECK(whole > 0);
  }
}

TEST_CASE("qcow2 create: a failing host call is an error, and leaves nothing that opens") {
  CreateOptions options = sized(1_MiB);
  options.preallocation = Preallocation::full;
  int failures = 0;
  for (uint64_t n = 1;; ++n) {
    auto memory = std::make_shared<MemStorage>();
    FaultStorage storage(memory);
    storage.fail_call(n, ErrorCode::no_space);
    const Result<> result = qcow2::create(storage, options);
    if (!storage.fired()) break;
    ++failures;
    CHECK_FALSE(result);
  }
  CHECK(failures > 5);
}
