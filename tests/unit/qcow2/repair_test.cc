#include <doctest/doctest.h>

#include <functional>
#include <string>
#include <vector>

#include "bytes.h"
#include "mendable.h"
#include "qemu.h"
#include "samples.h"
#include "support/builders.h"
#include "support/fault_storage.h"

using namespace imgfuse;
using namespace imgfuse::test;

namespace {

using S = Sample;

}  // namespace

TEST_CASE("qcow2 repair: a repair of everything makes the image clean, for qemu-img too, and keeps the mapping") {
  for (const Damage& damage : mendable()) {
    CAPTURE(std::string(damage.name));
    S sample;
    damage.make(sample);

    const Repaired after = repaired(sample.image, Repair::all);

    INFO(after.findings);
    CHECK(after.report.clean());
    if (!damage.changes_mapping) CHECK(mapping(after.image) == mapping(sample.image));
    CHECK((peek<uint64_t>(after.image, 72) & 3) == 0);  // neither dirty nor corrupt
    expect_clean_for_all(after.image);
  }
}

TEST_CASE("qcow2 repair: fixed findings are counted apart from those left") {
  S sample;
  sample.set_count(5, 3);    // a leak, and a wrong flag
  sample.set_l2(2, S::kL1);  // cannot be repaired
  sample.set_count(3, 2);

  const CheckReport report = repaired(sample.image, Repair::all).report;

  CHECK(report.corruptions == 1);
  CHECK(report.corruptions_fixed == 1);
  CHECK(report.leaks == 0);
  CHECK(report.leaks_fixed == 1);
}

TEST_CASE("qcow2 repair: leaks are kept as long as a reference cannot be followed") {
  S sample;
  sample.set_l1(sample.l1() | 0x200);  // the table, and its data, look unused

  const Repaired after = repaired(sample.image, Repair::leaks);

  CHECK(after.report.leaks == 4);
  CHECK(after.report.leaks_fixed == 0);
  MemImage healed = after.image;
  poke(healed, S::kL1, S::kL2 | kCopiedBit);
  CHECK(check_image(healed).clean());
}

TEST_CASE(
    "qcow2 repair: an address between two clusters leads to the one before it, if that is in use by nobody else") {
  S sample;
  const S sound = sample;
  SUBCASE("L1") { sample.set_l1(sample.l1() | 0x200); }
  SUBCASE("L2") { sample.set_l2(1, sample.l2(1) | 0x4000); }

  CHECK(mapping(repaired(sample.image, Repair::all).image) == mapping(sound.image));
}

TEST_CASE("qcow2 repair: what cannot be read never becomes what the backing file has") {
  MemImage image = make_qcow2({.size = 1_MiB, .backing = "base.raw"});
  image.write(S::kEnd - 1, std::array{std::byte{0}});
  poke<uint64_t>(image, S::kL1, S::kL2 | kCopiedBit);
  poke<uint16_t>(image, S::kRefcountBlock + 8, 1);
  SUBCASE("a cluster reads as zeros") {
    poke<uint64_t>(image, S::kL2, 0x10000000);
    const Repaired after = repaired(image, Repair::all);
    CHECK(after.report.clean());
    CHECK(peek<uint64_t>(after.image, S::kL2) == 1);
  }
  SUBCASE("a table is left as it is") {
    poke<uint64_t>(image, S::kL1, 0x10000000);
    const Repaired after = repaired(image, Repair::all);
    CHECK(after.report.corruptions == 1);
    CHECK(peek<uint64_t>(after.image, S::kL1) == 0x10000000);
  }
}

TEST_CASE("qcow2 repair: what it cannot mend it leaves alone, and the marks too") {
  const Damage list[] = {
      {"data on the L1 table", [](S& s) { s.set_l2(2, S::kL1); }},
      {"data on the header's neighbour", [](S& s) { s.set_l2(2, S::kL2); }},
  };
  for (const Damage& damage : list) {
    CAPTURE(std::string(damage.name));
    S sample;
    damage.make(sample);
    poke<uint64_t>(sample.image, 72, 3);

    const Repaired after = repaired(sample.image, Repair::all);

    CHECK(after.report.corruptions > 0);
    CHECK(peek<uint64_t>(after.image, 72) == 3);
    CHECK(mapping(after.image) == mapping(sample.image));
    CHECK(repaired(after.image, Repair::all).image.size() == after.image.size());  // does not grow each time
  }
}

TEST_CASE("qcow2 repair: leaks mode lowers counts and changes nothing else") {
  SUBCASE("leaks") {
    S sample;
    sample.set_count(5, 3);
    sample.set_count(4, 2);
    const Repaired after = repaired(sample.image, Repair::leaks);
    CHECK(after.report.clean());
    CHECK(after.report.leaks_fixed == 2);
    expect_clean_for_all(after.image);
  }
  SUBCASE("a count too low stays") {
    S sample;
    sample.set_count(5, 0);
    sample.set_count(6, 2);
    const Repaired after = repaired(sample.image, Repair::leaks);
    CHECK(after.report.corruptions == 2);
    CHECK(after.report.leaks_fixed == 1);
    CHECK(peek<uint16_t>(after.image, S::kRefcountBlock + 5 * 2) == 0);
  }
  SUBCASE("damaged structures are an error that says what to do") {
    S sample;
    poke<uint64_t>(sample.image, S::kRefcountTable, 0x20001);
    MemStorage storage(sample.image);
    const auto result = qcow2::check(storage, Repair::leaks, {});
    REQUIRE_FALSE(result);
    CHECK(result.error().text().find("`imgfuse check --repair all` builds new ones") != std::string::npos);
    CHECK(storage.counts().writes == 0);
  }
}

TEST_CASE("qcow2 repair: a clean image is not written to, but for its marks") {
  S sample;
  for (const Repair mode : {Repair::leaks, Repair::all}) {
    MemStorage storage(sample.image);
    CHECK(must(qcow2::check(storage, mode, {})).clean());
    CHECK(storage.counts().writes == 0);
  }
  poke<uint64_t>(sample.image, 72, 3);
  MemStorage storage(sample.image);
  CHECK(must(qcow2::check(storage, Repair::leaks, {})).clean());
  CHECK(storage.counts().writes == 1);
  CHECK(peek<uint64_t>(storage.image(), 72) == 0);
}

TEST_CASE("qcow2 repair: every refcount width and cluster size is rebuilt") {
  for (uint32_t order = 0; order <= 6; ++order) {
    for (const uint32_t cluster_size : {512u, 4096u, 65536u, 2u << 20}) {
      CAPTURE(order);
      CAPTURE(cluster_size);
      CreateOptions options;
      options.size = cluster_size * uint64_t{700} + 512;
      options.cluster_size = cluster_size;
      options.refcount_bits = 1u << order;
      options.preallocation = Preallocation::metadata;
      MemStorage storage;
      must(qcow2::create(storage, options));
      MemImage image = storage.image();
      const uint64_t table = peek<uint64_t>(image, 48);
      for (const bool lose_everything : {false, true}) {
        MemImage damaged = image;
        if (lose_everything) {
          poke<uint64_t>(damaged, 48, 0);
          poke<uint32_t>(damaged, 56, 0);
        } else {
          poke<uint64_t>(damaged, table, 1);
        }
        const Repaired after = repaired(damaged, Repair::all);
        CHECK(after.report.clean());
        CHECK(mapping(after.image) == mapping(image));
        if (cluster_size != 512) expect_clean_for_all(after.image);
      }
    }
  }
}

TEST_CASE("qcow2 repair: snapshots survive a rebuild, and their flags are left alone") {
  if (!have_qemu()) return;
  SnapshotSample sample;
  poke<uint64_t>(sample.image, Sample::kRefcountTable, 1);

  const Repaired after = repaired(sample.image, Repair::all);

  CHECK(after.report.clean());
  expect_clean_for_all(after.image);
  for (const char* name : {"one", "two"}) {
    const MemImage reverted = after_command(after.image, std::string("qemu-img snapshot -a ") + name + " {}");
    CHECK(mapping(reverted) == mapping(Sample().image));
    expect_clean_for_all(reverted);
  }
}

TEST_CASE("qcow2 repair: snapshot entries without the data that version 3 wants get it") {
  if (!have_qemu()) return;
  SnapshotSample sample;
  const uint64_t table = sample.table();
  // Two entries in the old form, each 48 bytes long.
  const uint64_t l1[] = {peek<uint64_t>(sample.image, table), peek<uint64_t>(sample.image, table + 72)};
  sample.image.zero(table, 4096);
  for (uint64_t i = 0; i < 2; ++i) {
    poke<uint64_t>(sample.image, table + i * 48, l1[i]);
    poke<uint32_t>(sample.image, table + i * 48 + 8, 1);
    poke<uint16_t>(sample.image, table + i * 48 + 12, 1);
    poke<uint16_t>(sample.image, table + i * 48 + 14, 3);
    poke_text(sample.image, table + i * 48 + 40, i == 0 ? "1one" : "2two");
  }

  const CheckReport before = repaired(sample.image, Repair::none).report;
  const Repaired after = repaired(sample.image, Repair::all);

  CHECK(before.corruptions == 2);
  CHECK(before.corruptions == qemu_check(sample.image).report.corruptions);
  CHECK(after.report.clean());
  CHECK(after.report.corruptions_fixed == 2);
  expect_clean_for_all(after.image);
  MemStorage storage(after.image);
  const std::vector<SnapshotInfo> snapshots = must(qcow2::info(storage)).snapshots;
  REQUIRE(snapshots.size() == 2);
  CHECK(snapshots[1].name == "two");
  CHECK(snapshots[1].disk_size == 1_MiB);
}

TEST_CASE("qcow2 repair: more references than the width can hold are left as corruption") {
  MemImage image = make_qcow2({.size = 1_MiB, .refcount_bits = 1});
  poke<uint64_t>(image, 0x30000, 0x40000 | kCopiedBit);
  poke<uint64_t>(image, 0x40000, 0x50000 | kCopiedBit);
  poke<uint64_t>(image, 0x40008, 0x50000 | kCopiedBit);
  image.resize(0x60000);
  poke<uint8_t>(image, 0x20000, 0x3f);

  const Repaired after = repaired(image, Repair::all);

  CHECK(after.report.corruptions > 0);
  CHECK(after.findings.find("left: cluster 5: refcount 1, references 2") != std::string::npos);
}

TEST_CASE("qcow2 repair: on a device the new structures stay inside it") {
  class Device final : public InterceptedStorage {
   public:
    using InterceptedStorage::InterceptedStorage;
    const StorageInfo& info() const override { return info_; }

   private:
    const StorageInfo info_{.name = "device", .writable = true, .extensible = false};
  };
  S sample;
  poke<uint64_t>(sample.image, S::kRefcountTable, 1);
  SUBCASE("with room") {
    sample.image.resize(S::kEnd + 2 * S::kCluster);
    auto memory = std::make_shared<MemStorage>(sample.image);
    Device device(memory);
    CHECK(must(qcow2::check(device, Repair::all, {})).clean());
    CHECK(memory->image().size() == S::kEnd + 2 * S::kCluster);
    expect_clean_for_all(memory->image());
  }
  SUBCASE("without") {
    auto memory = std::make_shared<MemStorage>(sample.image);
    Device device(memory);
    const auto result = qcow2::check(device, Repair::all, {});
    REQUIRE_FALSE(result);
    CHECK(result.error().code() == ErrorCode::no_space);
  }
}

TEST_CASE("qcow2 repair: opening a dirty image for writing puts counts right, and refuses what would lose an entry") {
  S sample;
  poke<uint64_t>(sample.image, 72, 1);
  sample.set_count(6, 0);
  sample.set_count(7, 9);
  SUBCASE("stale counts") {
    auto storage = std::make_shared<MemStorage>(sample.image);
    must(must(open_qcow2(storage))->close());
    expect_clean_for_all(storage->image());
    CHECK(mapping(storage->image()) == mapping(sample.image));
  }
  SUBCASE("an entry past the end of the file") {
    sample.set_l2(0, 0x10000000);
    auto storage = std::make_shared<MemStorage>(sample.image);
    CHECK_FALSE(open_qcow2(storage));
    CHECK(mapping(storage->image()) == mapping(sample.image));
    CHECK(peek<uint64_t>(storage->image(), 72) == 1);
  }
}
