// The host fails: for every storage call of every operation, the disk stays consistent or latches, and what was
// acknowledged is still there.
#include <doctest/doctest.h>

#include <algorithm>
#include <functional>

#include "faults.h"
#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/fault_storage.h"
#include "support/model_disk.h"
#include "support/order_storage.h"
#include "support/qcow2_view.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kCluster = Situation::kCluster;
constexpr uint64_t kSize = Situation::kSize;

struct Version2Kind {
  static MemImage image(const ImageSpec& spec) {
    return make_qcow2({.size = spec.size, .cluster_size = spec.cluster_size, .version = 2, .backing = spec.backing});
  }
};

/// Clusters 0…15 hold data, 16…23 are zero with space, 24…31 zero without; the rest is not allocated.
template <class Kind = Qcow2Kind>
Situation with_data(bool backing = false) {
  Situation s;
  ImageSpec spec{kSize, kCluster};
  s.content.resize(kSize);
  if (backing) {
    spec.backing = "base";
    s.backing.write(0, pattern(64 * kCluster + 1000, 99));
    s.backing.resize(65 * kCluster);
    s.content = s.backing;
    s.content.resize(kSize);
  }
  const WatchedDisk disk = open_watched(Kind::image(spec), {.backing = s.backing});
  const auto data = pattern(24 * kCluster, 5);
  must(disk->write(GuestOffset(0), data));
  s.content.write(0, data);
  must(disk->write_zeroes({GuestOffset(16 * kCluster), 8 * kCluster}, Zeroing::keep_allocation));
  must(disk->write_zeroes({GuestOffset(24 * kCluster), 8 * kCluster}, Zeroing::may_free));
  s.content.zero(16 * kCluster, 16 * kCluster);
  must(disk->close());
  s.image = disk.memory->image();
  return s;
}

/// Tiny clusters and wide counts, and a file that is just short of what `grown` says between two writes.
Situation crowded(const std::function<bool(const Qcow2View& before, const Qcow2View& after)>& grown) {
  Situation s;
  s.content.resize(kSize);
  s.image = make_qcow2({.size = kSize, .cluster_size = 512, .refcount_bits = 64});
  const auto memory = std::make_shared<MemStorage>(s.image);
  const auto disk = must(open_qcow2(memory));
  for (uint64_t at = 4_MiB;; at += 4096) {
    const auto data = pattern(4096, at);
    must(disk->write(GuestOffset(at), data));
    must(disk->flush());
    const MemImage next = memory->image();
    if (grown(*Qcow2View::parse(s.image), *Qcow2View::parse(next))) break;
    s.image = next;
    s.content.write(at, data);
  }
  must(disk->close());
  return s;
}

size_t refcount_blocks(const Qcow2View& view) {
  return static_cast<size_t>(
      std::count_if(view.references().begin(), view.references().end(),
                    [](const Reference& reference) { return reference.owner.kind == Owner::Kind::refcount_block; }));
}

TEST_CASE_TEMPLATE("an allocating write may fail at any call", Kind, IMG_EVERY_KIND) {
  fail_everywhere(with_data<Kind>(), {"write", [](Disk& disk, ModelDisk& model) {
                                        return write(disk, model, 50 * kCluster + 100, 5 * kCluster, 1);
                                      }});
}

TEST_CASE_TEMPLATE("a write that needs a new L2 table may fail at any call", Kind, IMG_EVERY_KIND) {
  fail_everywhere(with_data<Kind>(), {"write", [](Disk& disk, ModelDisk& model) {
                                        return write(disk, model, 2_MiB - kCluster, 3 * kCluster, 1);
                                      }});
}

TEST_CASE_TEMPLATE("an overwrite may fail at any call", Kind, IMG_EVERY_KIND) {
  fail_everywhere(with_data<Kind>(),
                  {"overwrite", [](Disk& disk, ModelDisk& model) { return write(disk, model, 700, 9 * kCluster, 1); }});
}

TEST_CASE_TEMPLATE("a write to zero clusters may fail at any call", Kind, IMG_EVERY_KIND) {
  fail_everywhere(with_data<Kind>(), {"write", [](Disk& disk, ModelDisk& model) {
                                        return write(disk, model, 15 * kCluster + 99, 12 * kCluster, 1);
                                      }});
}

TEST_CASE_TEMPLATE("a copy-on-write from the backing file may fail at any call", Kind, IMG_EVERY_KIND) {
  fail_everywhere(with_data<Kind>(true), {"write", [](Disk& disk, ModelDisk& model) -> Result<> {
                                            IMG_TRY(write(disk, model, 33 * kCluster + 100, 300, 1));
                                            return write(disk, model, 64 * kCluster + 100, kCluster, 2);
                                          }});
}

TEST_CASE_TEMPLATE("a discard may fail at any call", Kind, IMG_EVERY_KIND, Version2Kind) {
  const Operation discard{"discard", [](Disk& disk, ModelDisk& model) {
                            const GuestRange range{GuestOffset(3 * kCluster), 25 * kCluster};
                            model.zero(range);
                            return disk.discard(range);
                          }};
  fail_everywhere(with_data<Kind>(), discard);
  fail_everywhere(with_data<Kind>(true), discard);
}

TEST_CASE_TEMPLATE("zeroing may fail at any call", Kind, IMG_EVERY_KIND) {
  for (const Zeroing zeroing : {Zeroing::keep_allocation, Zeroing::may_free})
    fail_everywhere(with_data<Kind>(true),
                    {"zero", [zeroing](Disk& disk, ModelDisk& model) {
                       return zero(disk, model, {GuestOffset(kCluster + 100), 40 * kCluster}, zeroing);
                     }});
}

TEST_CASE_TEMPLATE("populating may fail at any call", Kind, IMG_EVERY_KIND) {
  fail_everywhere(with_data<Kind>(true), {"populate", [](Disk& disk, ModelDisk&) {
                                            return disk.populate({GuestOffset(14 * kCluster), 60 * kCluster});
                                          }});
}

TEST_CASE("qcow2: reuse of freed clusters may fail at any call") {
  fail_everywhere(with_data(), {"reuse", [](Disk& disk, ModelDisk& model) -> Result<> {
                                  const GuestRange range{GuestOffset(0), 8 * kCluster};
                                  model.zero(range);
                                  IMG_TRY(disk.discard(range));
                                  IMG_TRY(flush(disk, model));
                                  return write(disk, model, 60 * kCluster, 8 * kCluster, 1);
                                }});
}

TEST_CASE_TEMPLATE("growing may fail at any call", Kind, IMG_EVERY_KIND) {
  // The qcow2 image's L1 table moves, and FVD's table takes room from the journal.
  constexpr uint64_t size = std::is_same_v<Kind, Qcow2Kind> ? 20_GiB
                            : std::is_same_v<Kind, QedKind> ? 900_MiB
                                                            : kSize + 32_MiB;
  fail_everywhere(with_data<Kind>(), {"grow", [](Disk& disk, ModelDisk& model) -> Result<> {
                                        model.grow(size, 2 * kCluster);
                                        IMG_TRY(disk.resize(size));
                                        model.grown();
                                        return {};
                                      }});
}

TEST_CASE("qcow2: a growth that failed can be repeated, and shows nothing of a longer backing file") {
  for (const uint32_t version : {2u, 3u}) {
    CAPTURE(version);
    const MemImage image = make_qcow2({.size = 64_KiB, .cluster_size = 512, .version = version, .backing = "base"});
    MemImage backing;
    backing.write(0, pattern(512_KiB));
    for (uint64_t n = 1;; n += fault_step()) {
      CAPTURE(n);
      auto memory = std::make_shared<MemStorage>(image);
      auto faults = std::make_shared<FaultStorage>(memory);
      auto disk = must(open_qcow2(std::make_shared<OrderStorage>(faults, image), {.backing = backing}));
      faults->fail_call(n, ErrorCode::no_space);
      (void)disk->resize(256_KiB);
      const bool fired = faults->fired();
      faults->heal();
      (void)disk->close();  // an error if the disk latched

      disk = must(open_qcow2(std::make_shared<OrderStorage>(memory), {.backing = backing}));
      must(disk->resize(320_KiB));
      CHECK(read_all(*disk, GuestOffset(64_KiB), 256_KiB) == std::vector<std::byte>(256_KiB));
      must(disk->close());
      CHECK(check_image(memory->image()).corruptions == 0);
      if (!fired) break;
    }
  }
}

TEST_CASE("qcow2: a write to clusters shared with a snapshot may fail at any call") {
  Situation s = with_data();
  const std::optional<MemImage> image = with_snapshot(s.image);
  if (!image) return;
  s.image = *image;
  fail_everywhere(s, {"write", [](Disk& disk, ModelDisk& model) -> Result<> {
                        IMG_TRY(write(disk, model, 700, 3 * kCluster, 1));
                        model.zero({GuestOffset(8 * kCluster), 4 * kCluster});
                        return disk.discard({GuestOffset(8 * kCluster), 4 * kCluster});
                      }});
}

TEST_CASE("qcow2: a write that needs a new refcount block may fail at any call") {
  const auto more_blocks = [](const Qcow2View& before, const Qcow2View& after) {
    return refcount_blocks(after) > refcount_blocks(before);
  };
  fail_everywhere(crowded(more_blocks),
                  {"write", [](Disk& disk, ModelDisk& model) { return write(disk, model, 0, 5000, 1); }});
}

TEST_CASE("qcow2: a write that needs a longer refcount table may fail at any call") {
  const auto table_moved = [](const Qcow2View& before, const Qcow2View& after) {
    return after.refcount_table() != before.refcount_table();
  };
  fail_everywhere(crowded(table_moved),
                  {"write", [](Disk& disk, ModelDisk& model) { return write(disk, model, 0, 5000, 1); }});
}

TEST_CASE("qcow2: what was acknowledged can be read after a failed flush, even when its tables are crowded out") {
  for (const uint64_t failing : {1, 2}) {  // before and behind the write of the tables
    auto faults =
        std::make_shared<FaultStorage>(std::make_shared<MemStorage>(make_qcow2({.size = kSize, .cluster_size = 512})));
    auto disk = must(open_qcow2(faults, {.metadata_cache = 1}));
    for (uint64_t at = 0; at < kSize; at += 32_KiB) must(disk->write(GuestOffset(at), pattern(512, at)));
    must(disk->flush());
    must(disk->write(GuestOffset(512), pattern(512, 7)));
    faults->fail_call(failing, ErrorCode::io, {.calls = Call::flush});

    CHECK_FALSE(disk->flush());

    for (uint64_t at = 0; at < kSize; at += 32_KiB) CHECK(read_all(*disk, GuestOffset(at), 512) == pattern(512, at));
    CHECK(read_all(*disk, GuestOffset(512), 512) == pattern(512, 7));
    CHECK_FALSE(disk->close());
  }
}

TEST_CASE_TEMPLATE("closing may fail at any call", Kind, IMG_EVERY_KIND) {
  fail_closing(with_data<Kind>(), {"allocating and freeing", [](Disk& disk, ModelDisk& model) -> Result<> {
                                     IMG_TRY(write(disk, model, 50 * kCluster, 4 * kCluster, 1));
                                     return zero(disk, model, {GuestOffset(0), 4 * kCluster}, Zeroing::may_free);
                                   }});
}

TEST_CASE_TEMPLATE("opening may fail at any call, and leaves the image as it was", Kind, IMG_EVERY_TABLE_KIND) {
  Situation s = with_data<Kind>();
  s.image.write(Kind::kAutoclearAt, std::array{std::byte{0x01}});  // autoclear bits give it something to write
  for (uint64_t n = 1;; n += fault_step()) {
    CAPTURE(n);
    auto crash = std::make_shared<CrashStorage>(s.image);
    auto faults = std::make_shared<FaultStorage>(crash);
    faults->fail_call(n, ErrorCode::io);

    auto disk = open_image(faults, {});

    faults->heal();
    CHECK(disk.has_value() != faults->fired());
    if (disk) must((*disk)->close());
    Rng rng(n);
    check_crashed(*crash, model_of(s), s, rng);
    if (!faults->fired()) break;
  }
}

TEST_CASE_TEMPLATE("a failed read is an error of that read only", Kind, IMG_EVERY_KIND) {
  const Situation s = with_data<Kind>();
  for (uint64_t n = 1;; n += fault_step()) {
    CAPTURE(n);
    auto faults = std::make_shared<FaultStorage>(std::make_shared<MemStorage>(s.image));
    auto disk = must(open_image(faults, {}));
    const ModelDisk model = model_of(s);
    faults->fail_call(n, ErrorCode::io);

    const std::string first = model.compare_exactly(*disk);

    faults->heal();
    CHECK((first != "") == faults->fired());
    CHECK(model.compare_exactly(*disk) == "");
    must(disk->write(GuestOffset(0), pattern(512)));
    must(disk->close());
    if (!faults->fired()) break;
  }
}

TEST_CASE_TEMPLATE("after a failed flush every write and flush is refused, and reads go on", Kind, IMG_EVERY_KIND) {
  const Situation s = with_data<Kind>();
  auto faults = std::make_shared<FaultStorage>(std::make_shared<MemStorage>(s.image));
  auto disk = must(open_image(faults, {}));
  must(disk->write(GuestOffset(0), pattern(512, 1)));
  faults->fail_call(1, ErrorCode::io, {.calls = Call::flush});

  CHECK_FALSE(disk->flush());

  CHECK_FALSE(disk->flush());
  CHECK_FALSE(disk->write(GuestOffset(0), pattern(512, 2)));
  CHECK_FALSE(disk->discard({GuestOffset(0), kCluster}));
  CHECK_FALSE(disk->write_zeroes({GuestOffset(0), kCluster}, Zeroing::may_free));
  CHECK_FALSE(disk->resize(1_GiB));
  CHECK(read_all(*disk, GuestOffset(0), 512) == pattern(512, 1));
  CHECK_FALSE(disk->close());
}

}  // namespace
}  // namespace imgfuse::test
