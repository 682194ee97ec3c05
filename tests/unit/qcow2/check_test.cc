#include <doctest/doctest.h>

#include <functional>
#include <string>
#include <vector>

#include "bytes.h"
#include "luks_image.h"
#include "qemu.h"
#include "samples.h"
#include "support/builders.h"

using namespace imgfuse;
using namespace imgfuse::test;

namespace {

struct Checked {
  CheckReport report;
  std::string findings;
};

Checked checked(const MemImage& image) {
  MemStorage storage(image);
  Checked result;
  result.report = must(qcow2::check(storage, Repair::none, [&](const std::string& f) { result.findings += f + "\n"; }));
  CHECK(storage.counts().writes == 0);
  return result;
}

void expect_same(const CheckReport& ours, const CheckReport& theirs) {
  CHECK(ours.corruptions == theirs.corruptions);
  CHECK(ours.leaks == theirs.leaks);
  CHECK(ours.check_errors == theirs.check_errors);
  CHECK(ours.total_clusters == theirs.total_clusters);
  CHECK(ours.allocated_clusters == theirs.allocated_clusters);
  CHECK(ours.compressed_clusters == theirs.compressed_clusters);
  CHECK(ours.fragmented_clusters == theirs.fragmented_clusters);
  CHECK(ours.image_end_offset == theirs.image_end_offset);
}

void expect_like_qemu(const MemImage& image) {
  if (!have_qemu()) return;
  const Checked ours = checked(image);
  const QemuCheck qemu = qemu_check(image);
  INFO("imgfuse:\n" << ours.findings << "qemu-img:\n" << qemu.errors);
  expect_same(ours.report, qemu.report);
}

/// Whether QEMU counts a damage as imgfuse does.
enum class Qemu { agrees, differs };

struct Damage {
  const char* name;
  std::function<void(Sample&)> make;
  uint64_t corruptions;
  uint64_t leaks;
  const char* finding;
  Qemu qemu = Qemu::agrees;
};

using S = Sample;

const std::vector<Damage>& damages() {
  static const std::vector<Damage> list = {
      // Counts.
      {"count too high", [](S& s) { s.set_count(5, 3); }, 1, 1, "leaked cluster 5: refcount 3, references 1"},
      {"count of an unused cluster",
       [](S& s) {
         s.image.resize(S::kEnd + S::kCluster);
         s.set_count(8, 1);
       },
       0, 1, "leaked cluster 8: refcount 1, references 0"},
      {"count behind the end of the file", [](S& s) { s.set_count(20, 1); }, 0, 0, ""},
      {"count zero", [](S& s) { s.set_count(5, 0); }, 2, 0, "cluster 5: refcount 0, references 1"},
      {"count of metadata zero", [](S& s) { s.set_count(3, 0); }, 1, 0, "cluster 3: refcount 0, references 1"},
      {"count of the header zero", [](S& s) { s.set_count(0, 0); }, 1, 0, "cluster 0: refcount 0, references 1"},
      {"count too low",
       [](S& s) {
         for (int i : {1, 2}) s.set_l2(static_cast<uint64_t>(i), s.l2(0));
         s.set_count(5, 2);
       },
       4, 1, "cluster 5: refcount 2, references 3"},
      // Standard L2 entries.
      {"COPIED missing", [](S& s) { s.set_l2(0, S::kData); }, 1, 0,
       "cluster 5: refcount 1, but 1 entries point at it without the COPIED flag"},
      {"COPIED on a shared cluster",
       [](S& s) {
         s.set_l2(2, s.l2(0));
         s.set_count(5, 2);
       },
       2, 0, "cluster 5: refcount 2, but 2 entries point at it with the COPIED flag"},
      {"two guest clusters on one host cluster", [](S& s) { s.set_l2(1, s.l2(0)); }, 1, 1,
       "cluster 5: refcount 1, references 2"},
      {"reserved bits", [](S& s) { s.set_l2(0, s.l2(0) | 2); }, 1, 0,
       "entry 0 of the L2 table at 0x40000 has reserved bits set: 0x8000000000050002"},
      {"high reserved bits", [](S& s) { s.set_l2(0, s.l2(0) | uint64_t{1} << 56); }, 1, 0, "has reserved bits set"},
      {"reserved bits without an offset", [](S& s) { s.set_l2(5, 4); }, 1, 0, "entry 5 of the L2 table"},
      {"unaligned", [](S& s) { s.set_l2(0, s.l2(0) | 0x200); }, 2, 0,
       "entry 0 of the L2 table at 0x40000 points at 0x50200, which is not a multiple of the cluster size 65536"},
      {"unaligned zero cluster", [](S& s) { s.set_l2(0, s.l2(0) | 0x201); }, 2, 0, "which is not a multiple"},
      {"past the end of the file", [](S& s) { s.set_l2(0, 0x10000000); }, 1, 1,
       "entry 0 of the L2 table at 0x40000 points at 0x10000000, past the end of the file (0x80000)"},
      {"past the end of the file with COPIED", [](S& s) { s.set_l2(0, 0x10000000 | kCopiedBit); }, 2, 1,
       "cluster 4096: refcount 0, but 1 entries point at it with the COPIED flag"},
      {"just past the end of the file", [](S& s) { s.set_l2(2, S::kEnd); }, 1, 0, "points at 0x80000, past the end"},
      {"largest offset", [](S& s) { s.set_l2(2, kAddressBits & ~uint64_t{0xffff}); }, 1, 0, "past the end"},
      {"points at the L1 table", [](S& s) { s.set_l2(0, S::kL1 | kCopiedBit); }, 1, 1,
       "cluster 3: refcount 1, references 2"},
      {"points at the refcount table", [](S& s) { s.set_l2(0, S::kRefcountTable | kCopiedBit); }, 1, 1,
       "cluster 1: refcount 1, references 2"},
      {"points at a refcount block", [](S& s) { s.set_l2(0, S::kRefcountBlock | kCopiedBit); }, 2, 1,
       "refcount block 0 at 0x20000 has 2 references instead of 1"},
      {"points at its own table", [](S& s) { s.set_l2(0, S::kL2 | kCopiedBit); }, 1, 1,
       "cluster 4: refcount 1, references 2"},
      {"points at metadata, with the right count",
       [](S& s) {
         s.set_l2(2, S::kL1);
         s.set_count(3, 2);
       },
       1, 0, "cluster 3 holds metadata, but has 2 references", Qemu::differs},
      // Compressed entries.
      {"compressed with COPIED", [](S& s) { s.set_l2(0, kCompressedBit | kCopiedBit | S::kData); }, 1, 0,
       "is compressed and has the COPIED flag set"},
      {"compressed past the end of the file", [](S& s) { s.set_l2(2, kCompressedBit | 0x10000000); }, 1, 0,
       "past the end of the file"},
      {"compressed over data", [](S& s) { s.set_l2(2, kCompressedBit | S::kData); }, 1, 0,
       "cluster 5: refcount 1, references 2"},
      // L1 entries.
      {"L1 reserved bits", [](S& s) { s.set_l1(s.l1() | 1); }, 1, 0,
       "L1 entry at 0x30000 has reserved bits set: 0x8000000000040001"},
      {"L1 COPIED missing", [](S& s) { s.set_l1(S::kL2); }, 1, 0,
       "cluster 4: refcount 1, but 1 entries point at it without"},
      {"L1 past the end of the file", [](S& s) { s.set_l1(0x10000000 | kCopiedBit); }, 2, 4,
       "L1 entry at 0x30000 points at 0x10000000, past the end of the file (0x80000)"},
      {"L1 unaligned", [](S& s) { s.set_l1(s.l1() | 0x200); }, 1, 4,
       "L1 entry at 0x30000 points at 0x40200, which is not a multiple of the cluster size 65536", Qemu::differs},
      {"L1 with reserved bits only", [](S& s) { s.set_l1(1); }, 1, 4, "L1 entry at 0x30000 has reserved bits set",
       Qemu::differs},
      {"the L1 table is its own L2 table", [](S& s) { s.set_l1(S::kL1 | kCopiedBit); }, 1, 4,
       "cluster 3: refcount 1, references 3"},
      {"the L1 table lies in the data", [](S& s) { poke<uint64_t>(s.image, 40, S::kData); }, 2, 4, "", Qemu::differs},
      // Refcount structures.
      {"refcount table entry with reserved bits", [](S& s) { poke<uint64_t>(s.image, S::kRefcountTable, 0x20001); }, 1,
       1, "refcount table entry 0 has reserved bits set: 0x0000000000020001"},
      {"refcount table entry unaligned", [](S& s) { poke<uint64_t>(s.image, S::kRefcountTable, 0x20200); }, 12, 0,
       "refcount table entry 0 points at 0x20200, which is not a multiple of the cluster size", Qemu::differs},
      {"refcount block missing", [](S& s) { poke<uint64_t>(s.image, S::kRefcountTable, 0); }, 11, 0,
       "cluster 7: refcount 0, references 1"},
      {"refcount block past the end of the file", [](S& s) { poke<uint64_t>(s.image, S::kRefcountTable, 0x10000000); },
       12, 0, "refcount table entry 0 points at 0x10000000, past the end of the file (0x80000)"},
      {"refcount block past 2^63", [](S& s) { poke<uint64_t>(s.image, S::kRefcountTable, 0xffffffffffff0000); }, 12, 0,
       "past the end of the file", Qemu::differs},
      {"refcount block twice", [](S& s) { poke<uint64_t>(s.image, S::kRefcountTable + 8, 0x20000); }, 2, 0,
       "refcount block 1 at 0x20000 has 2 references instead of 1"},
      {"refcount block in data", [](S& s) { poke<uint64_t>(s.image, S::kRefcountTable + 8, S::kData); }, 2, 0,
       "refcount block 1 at 0x50000 has 2 references instead of 1"},
      {"refcount block in the header", [](S& s) { poke<uint64_t>(s.image, S::kRefcountTable + 16, S::kRefcountTable); },
       2, 0, "refcount block 2 at 0x10000 has 2 references instead of 1"},
      {"no refcount table", [](S& s) { poke<uint32_t>(s.image, 56, 0); }, 10, 0, "cluster 0: refcount 0, references 1"},
      {"refcount table on the L1 table", [](S& s) { poke<uint64_t>(s.image, 48, S::kL1); }, 11, 0,
       "cluster 3: refcount 0, references 2", Qemu::differs},
      // Marks in the header are no damage by themselves.
      {"dirty", [](S& s) { poke<uint64_t>(s.image, 72, 1); }, 0, 0, ""},
      {"corrupt", [](S& s) { poke<uint64_t>(s.image, 72, 2); }, 0, 0, ""},
  };
  return list;
}

}  // namespace

TEST_CASE("qcow2 check: a sound image is clean, with qemu-img's numbers") {
  const CheckReport report = check_image(Sample().image);

  CHECK(report.clean());
  CHECK(report.total_clusters == 16);
  CHECK(report.allocated_clusters == 3);
  CHECK(report.compressed_clusters == 0);
  CHECK(report.fragmented_clusters == 0);
  CHECK(report.image_end_offset == Sample::kEnd);
  expect_like_qemu(Sample().image);
}

TEST_CASE("qcow2 check: every kind of damage is found, named, and counted as qemu-img counts it") {
  for (const Damage& damage : damages()) {
    CAPTURE(std::string(damage.name));
    Sample sample;
    damage.make(sample);

    const Checked ours = checked(sample.image);

    INFO(ours.findings);
    CHECK(ours.report.corruptions == damage.corruptions);
    CHECK(ours.report.leaks == damage.leaks);
    CHECK(ours.report.check_errors == 0);
    CHECK(ours.findings.find(damage.finding) != std::string::npos);
    if (damage.qemu == Qemu::agrees) expect_like_qemu(sample.image);
  }
}

TEST_CASE("qcow2 check: zero flags are corruption in version 2, which does not know them") {
  MemImage image = make_qcow2({.size = 1_MiB, .version = 2});
  poke<uint64_t>(image, 0x30000, 0x40000 | kCopiedBit);
  poke<uint64_t>(image, 0x40000, 1);
  image.write(0x4ffff, std::array{std::byte{0}});
  poke<uint16_t>(image, 0x20008, 1);

  const Checked ours = checked(image);

  CHECK(ours.report.corruptions == 1);
  CHECK(ours.findings == "entry 0 of the L2 table at 0x40000 has a zero flag, which version 2 does not know\n");
}

TEST_CASE("qcow2 check: damage in snapshots is found") {
  if (!have_qemu()) return;
  struct SnapshotDamage {
    const char* name;
    std::function<void(SnapshotSample&)> make;
    uint64_t corruptions;
    uint64_t leaks;
    const char* finding;
  };
  const SnapshotDamage list[] = {
      {"none", [](SnapshotSample&) {}, 0, 0, ""},
      {"L1 unaligned", [](SnapshotSample& s) { poke<uint64_t>(s.image, s.table(), s.l1() | 0x200); }, 1, 5,
       "snapshot 1 (one): L1 table offset"},
      {"L1 too large", [](SnapshotSample& s) { poke<uint32_t>(s.image, s.table() + 8, 0x7fffffff); }, 1, 5,
       "snapshot 1 (one): L1 table of 2147483647 entries is larger than 32 MiB"},
      {"L1 past the end of the file", [](SnapshotSample& s) { poke<uint64_t>(s.image, s.table(), 0x10000000); }, 1, 5,
       "snapshot 1: its L1 table points at 0x10000000, past the end of the file"},
      {"one L1 for both", [](SnapshotSample& s) { poke<uint64_t>(s.image, s.table() + 72, s.l1()); }, 1, 1,
       "references 2"},
      {"flags there mean nothing",
       [](SnapshotSample& s) { poke(s.image, s.l1(), peek<uint64_t>(s.image, s.l1()) ^ kCopiedBit); }, 0, 0, ""},
      {"reserved bits in L1", [](SnapshotSample& s) { poke(s.image, s.l1(), peek<uint64_t>(s.image, s.l1()) | 1); }, 1,
       0, "has reserved bits set"},
      {"reserved bits in an L2 table of two snapshots",
       [](SnapshotSample& s) { poke(s.image, s.l2(), peek<uint64_t>(s.image, s.l2()) | 2); }, 2, 0,
       "has reserved bits set"},
      {"a cluster unmapped", [](SnapshotSample& s) { poke<uint64_t>(s.image, s.l2(), 0); }, 0, 1, "leaked cluster 5"},
      {"the table's count",
       [](SnapshotSample& s) { poke<uint16_t>(s.image, Sample::kRefcountBlock + (s.table() >> 16) * 2, 0); }, 1, 0,
       "refcount 0, references 1"},
  };
  for (const SnapshotDamage& damage : list) {
    CAPTURE(std::string(damage.name));
    SnapshotSample sample;
    damage.make(sample);
    const Checked ours = checked(sample.image);
    INFO(ours.findings);
    CHECK(ours.report.corruptions == damage.corruptions);
    CHECK(ours.report.leaks == damage.leaks);
    CHECK(ours.findings.find(damage.finding) != std::string::npos);
    expect_like_qemu(sample.image);
  }
}

TEST_CASE("qcow2 check: images with compressed clusters, bitmaps and encryption are clean, and every cluster counts") {
  if (!have_qemu()) return;
  const std::string noise = "seq 1 50000 > {}.raw && truncate -s 4M {}.raw && ";
  const std::string commands[] = {
      noise + "qemu-img convert -f raw -O qcow2 -c {}.raw {} && rm {}.raw",
      noise + "qemu-img convert -f raw -O qcow2 -c -o compression_type=zstd,cluster_size=4k {}.raw {} && rm {}.raw",
      noise + "qemu-img convert -f raw -O qcow2 -c -o cluster_size=512,refcount_bits=64 {}.raw {} && rm {}.raw",
      noise + "qemu-img convert -f raw -O qcow2 -c -o cluster_size=2M {}.raw {} && rm {}.raw",
      "qemu-img create -f qcow2 {} 4M && qemu-img bitmap --add {} b && qemu-io -f qcow2 -c 'write 1M 1M' {} && "
      "qemu-img bitmap --add -g 512 {} c && qemu-img snapshot -c s {}",
      "qemu-img create -f qcow2 -o refcount_bits=2,cluster_size=1k {} 4M && qemu-io -f qcow2 -c 'write 100k 2M' {} && "
      "qemu-img snapshot -c a {} && qemu-img snapshot -c b {}",
      "qemu-img create -f qcow2 {} 4M",  // to become an encrypted one
  };
  for (const std::string& command : commands) {
    CAPTURE(command);
    MemImage image = made_by(command);
    if (&command == std::end(commands) - 1) add_luks_header(image);
    CHECK(checked(image).report.clean());
    expect_like_qemu(image);

    // The count of any one cluster is missed.
    const uint64_t table = peek<uint64_t>(image, 48);
    const uint64_t block = peek<uint64_t>(image, table);
    const uint32_t bits = 1u << peek<uint32_t>(image, 96);
    const uint64_t cluster = uint64_t{1} << peek<uint32_t>(image, 20);
    for (uint64_t byte = 0; byte < 24 && byte * 8 / bits * cluster < image.size(); ++byte) {
      MemImage damaged = image;
      poke<uint8_t>(damaged, block + byte, static_cast<uint8_t>(peek<uint8_t>(image, block + byte) ^ 1));
      const Checked ours = checked(damaged);
      INFO("byte " << byte << ": " << ours.findings);
      CHECK_FALSE(ours.report.clean());
      if (byte % 4 == 0) expect_like_qemu(damaged);
    }
  }
}

TEST_CASE("qcow2 check: damaged bitmap structures are found") {
  if (!have_qemu()) return;
  const MemImage image =
      made_by("qemu-img create -f qcow2 {} 4M && qemu-img bitmap --add {} b && qemu-io -f qcow2 -c 'write 1M 1M' {}");
  // The extension comes first or second; find its directory.
  uint64_t at = 112;
  while (peek<uint32_t>(image, at) != 0x23852875) at += 8 + (peek<uint32_t>(image, at + 4) + 7) / 8 * 8;
  const uint64_t directory = peek<uint64_t>(image, at + 24);
  const uint64_t table = peek<uint64_t>(image, directory);
  MemImage damaged = image;
  SUBCASE("directory unaligned") { poke<uint64_t>(damaged, at + 24, directory + 512); }
  SUBCASE("directory too long") { poke<uint64_t>(damaged, at + 16, uint64_t{1} << 40); }
  SUBCASE("too many bitmaps") { poke<uint32_t>(damaged, at + 8, 65536); }
  SUBCASE("more bitmaps than the directory holds") { poke<uint32_t>(damaged, at + 8, 2); }
  SUBCASE("table unaligned") { poke<uint64_t>(damaged, directory, table + 512); }
  SUBCASE("table too long") { poke<uint32_t>(damaged, directory + 8, 0xffffffff); }
  SUBCASE("table past the end of the file") { poke<uint64_t>(damaged, directory, uint64_t{1} << 40); }
  SUBCASE("data past the end of the file") { poke<uint64_t>(damaged, table, uint64_t{1} << 40); }
  SUBCASE("reserved bits in the table") { poke<uint64_t>(damaged, table, peek<uint64_t>(damaged, table) | 4); }

  CHECK(checked(damaged).report.corruptions > 0);

  poke<uint64_t>(damaged, 88, 0);  // not valid, says the header: nothing there counts
  const Checked ours = checked(damaged);
  CHECK(ours.report.corruptions == 0);
  CHECK(ours.report.leaks >= 2);
}

TEST_CASE("qcow2 check: images with extended L2 entries and data files are counted as qemu-img counts them") {
  if (!have_qemu()) return;
  const std::string writes =
      "qemu-io -f qcow2 -c 'write 0 40k' -c 'write 65k 1k' -c 'write -z 70k 8k' -c 'write -z -u 1M 64k' "
      "-c 'write 3M 200k' {}";
  const std::string images[] = {
      "qemu-img create -f qcow2 -o extended_l2=on,cluster_size=16k {} 4M && " + writes +
          " && qemu-img snapshot -c s {}",
      "qemu-img create -f qcow2 -o extended_l2=on,cluster_size=2M {} 8M && " + writes,
      "qemu-img create -f qcow2 -o data_file={}.data {} 4M && " + writes,
      "qemu-img create -f qcow2 -o data_file={}.data,data_file_raw=on {} 4M && " + writes,
      "qemu-img create -f qcow2 -o data_file={}.data,extended_l2=on {} 4M && " + writes,
  };
  for (const std::string& command : images) {
    CAPTURE(command);
    const MemImage image = made_by(command);
    CHECK(checked(image).report.clean());
    if (command.find("data_file") == std::string::npos) expect_like_qemu(image);
  }
}

TEST_CASE("qcow2 check: random damage is counted as qemu-img counts it") {
  if (!have_qemu()) return;
  const uint64_t runs = from_environment("IMG_RUNS", 60);
  const SnapshotSample original;
  for (uint64_t run = 0; run < runs; ++run) {
    CAPTURE(base_seed());
    CAPTURE(run);
    Rng rng(base_seed() + run);
    MemImage image = original.image;
    const uint64_t tables[] = {Sample::kL2, peek<uint64_t>(image, Sample::kL1) & kAddressBits};
    for (uint64_t changes = rng.between(1, 5); changes > 0; --changes) {
      const uint64_t entry = tables[rng.below(2)] + rng.below(6) * 8;
      const uint64_t somewhere = rng.between(1, image.size() / 65536 + 1) * 65536;
      switch (rng.below(6)) {
        case 0:
          poke<uint16_t>(image, Sample::kRefcountBlock + rng.below(14) * 2, static_cast<uint16_t>(rng.below(4)));
          break;
        case 1:
          poke(image, entry, somewhere);
          break;
        case 2:
          poke(image, entry, somewhere | kCopiedBit);
          break;
        case 3:
          poke(image, entry, peek<uint64_t>(image, entry) ^ kCopiedBit);
          break;
        case 4:
          poke<uint64_t>(image, entry, kCompressedBit | somewhere | rng.below(65536) | rng.below(256) << 54);
          break;
        case 5:
          poke<uint64_t>(image, entry, rng.below(2));
          break;
      }
    }
    // Where data lies on metadata with the right count, only imgfuse objects.
    if (checked(image).findings.find("holds metadata") == std::string::npos) expect_like_qemu(image);
  }
}
