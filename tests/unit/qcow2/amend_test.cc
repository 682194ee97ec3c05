// Amending: the disk reads the same at every moment, whatever crashes or fails.
#include <doctest/doctest.h>

#include "bytes.h"
#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/fault_storage.h"
#include "support/order_storage.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kSize = 1_MiB;

struct Sample {
  MemImage image;
  MemImage backing;
  std::vector<std::byte> content;

  BackingOpener opener() const {
    return [this](const std::string&, const std::optional<std::string>&) {
      return Result<std::unique_ptr<Disk>>(make_raw_disk(backing));
    };
  }
  std::vector<std::byte> read(const MemImage& from) const {
    auto disk = must(open_qcow2(std::make_shared<MemStorage>(from), {.read_only = true, .backing = backing}));
    auto bytes = read_all(*disk, GuestOffset(0), kSize);
    must(disk->close());
    return bytes;
  }
};

/// Data, zero clusters with and without space, and nothing.
Sample sample(bool with_backing) {
  Sample sample;
  sample.backing.write(0, pattern(kSize / 2, 7));
  Qcow2Spec spec{.size = kSize, .cluster_size = 4096};
  if (with_backing) spec.backing = "base";
  auto storage = std::make_shared<MemStorage>(make_qcow2(spec));
  auto disk = must(open_qcow2(storage, {.backing = sample.backing}));
  must(disk->write(GuestOffset(0), pattern(100000, 1)));
  must(disk->write_zeroes({GuestOffset(8192), 8192}, Zeroing::keep_allocation));
  must(disk->write_zeroes({GuestOffset(32768), 16384}, Zeroing::may_free));
  must(disk->write_zeroes({GuestOffset(kSize - 65536), 8192}, Zeroing::may_free));
  must(disk->close());
  sample.image = storage->image();
  sample.content = sample.read(sample.image);
  return sample;
}

uint32_t version_of(const MemImage& image) { return peek<uint32_t>(image, 4); }

}  // namespace

TEST_CASE("qcow2 amend: after a crash at any moment the disk reads the same, in the old or the new version") {
  Rng rng(base_seed());
  for (const bool with_backing : {false, true}) {
    Sample start = sample(with_backing);
    for (const std::string compat : {"0.10", "1.1"}) {
      CAPTURE(compat);
      auto storage = std::make_shared<CrashStorage>(start.image);
      std::vector<MemImage> crashed;
      storage->set_observer([&] {
        for (const CrashMode mode : {CrashMode::none, CrashMode::all, CrashMode::torn})
          crashed.push_back(storage->crash(mode, rng));
      });
      must(qcow2::amend(std::make_shared<OrderStorage>(storage, start.image), {.compat = compat}, start.opener()));
      storage->set_observer({});
      for (const MemImage& left : crashed) {
        CHECK(check_image(left).corruptions == 0);
        REQUIRE(start.read(left) == start.content);
      }
      start.image = storage->image();
      CHECK(version_of(start.image) == (compat == "1.1" ? 3 : 2));
      CHECK(check_image(start.image).clean());
    }
  }
}

TEST_CASE("qcow2 amend: whatever call fails, the disk reads the same") {
  const Sample start = sample(true);
  for (uint64_t n = 1;; n += fault_step()) {
    CAPTURE(n);
    auto memory = std::make_shared<MemStorage>(start.image);
    auto faults = std::make_shared<FaultStorage>(memory);
    faults->fail_call(n, ErrorCode::io, {.torn = true});
    const Result<> amended = qcow2::amend(faults, {.compat = "0.10"}, start.opener());
    CHECK(check_image(memory->image()).corruptions == 0);
    CHECK(start.read(memory->image()) == start.content);
    if (amended) CHECK(version_of(memory->image()) == 2);
    if (!faults->fired()) {
      CHECK(amended);
      break;
    }
  }
}

TEST_CASE("qcow2 amend: what is refused changes nothing") {
  const auto refused = [](const MemImage& image, const AmendOptions& options) {
    auto storage = std::make_shared<MemStorage>(image);
    const Result<> amended = qcow2::amend(storage, options, {});
    CHECK_FALSE(amended);
    CHECK(storage->counts().writes == 0);
  };
  const MemImage plain = make_qcow2({.size = kSize});
  refused(plain, {.compat = "2"});
  refused(plain, {.compat = "0.10", .lazy_refcounts = true});
  refused(plain, {.backing_format = "raw"});
  refused(plain, {.data_file_raw = true});
  refused(make_qcow2({.size = kSize, .refcount_bits = 1}), {.compat = "0.10"});
  refused(make_qcow2({.size = kSize, .version = 2}), {.lazy_refcounts = true});
  refused(make_qcow2({.size = kSize, .backing = "base"}), {.backing_format = "vmdk"});
}

}  // namespace imgfuse::test
