// Damage that a repair of everything puts right, and the repairing.
#pragma once

#include <doctest/doctest.h>

#include <functional>
#include <string>
#include <vector>

#include "bytes.h"
#include "qemu.h"
#include "samples.h"
#include "support/builders.h"

namespace imgfuse::test {

struct Repaired {
  MemImage image;
  CheckReport report;
  std::string findings;
};

inline Repaired repaired(const MemImage& image, Repair mode) {
  MemStorage storage(image);
  Repaired result;
  result.report = must(qcow2::check(storage, mode, [&](const std::string& f) { result.findings += f + "\n"; }));
  result.image = storage.image();
  return result;
}

inline void expect_clean_for_all(const MemImage& image) {
  CHECK(check_image(image).clean());
  const bool data_apart = (peek<uint64_t>(image, 72) & 4) != 0;  // in a file that is not there
  if (data_apart || !have_qemu()) return;
  const QemuCheck qemu = qemu_check(image);
  INFO(qemu.errors);
  CHECK(qemu.status == 0);
}

/// The active mapping without flags: what a repair must not change.
inline std::vector<uint64_t> mapping(const MemImage& image) {
  const uint64_t cluster = uint64_t{1} << peek<uint32_t>(image, 20);
  const uint64_t l1 = peek<uint64_t>(image, 40);
  std::vector<uint64_t> entries;
  for (uint32_t i = 0; i < peek<uint32_t>(image, 36); ++i) {
    const uint64_t table = peek<uint64_t>(image, l1 + i * 8) & kAddressBits;
    for (uint64_t k = 0; table != 0 && k < cluster / 8; ++k)
      if (const uint64_t entry = peek<uint64_t>(image, table + k * 8); entry != 0)
        entries.push_back(entry & ~kCopiedBit);
  }
  return entries;
}

struct Damage {
  const char* name;
  std::function<void(Sample&)> make;
  bool changes_mapping = false;  ///< what cannot be followed has to go
};

/// The same disk with L2 entries of 16 bytes.
inline void extend(Sample& s) {
  const uint64_t entries[] = {s.l2(0), s.l2(1), 0, s.l2(3)};
  s.image.zero(Sample::kL2, Sample::kCluster);
  for (uint64_t i = 0; i < 4; ++i) {
    poke<uint64_t>(s.image, Sample::kL2 + i * 16, entries[i]);
    poke<uint64_t>(s.image, Sample::kL2 + i * 16 + 8, entries[i] ? 0xffffffff : 0);
  }
  poke<uint64_t>(s.image, 72, 16);
}

/// The same with its data in another file, of which only the name is there.
inline void keep_data_apart(Sample& s) {
  for (uint64_t i : {0, 1, 3}) {
    s.set_l2(i, i * Sample::kCluster | kCopiedBit);
    s.set_count(5 + i - i / 3, 0);
  }
  poke<uint32_t>(s.image, 112, 0x44415441);
  poke<uint32_t>(s.image, 116, 4);
  poke_text(s.image, 120, "data");
  s.image.zero(124, 16);
  poke<uint64_t>(s.image, 72, 4);
}

/// Damage that a repair of everything puts right.
inline const std::vector<Damage>& mendable() {
  using S = Sample;
  static const std::vector<Damage> list = {
      {"count too high", [](S& s) { s.set_count(5, 3); }},
      {"count of the L2 table too high", [](S& s) { s.set_count(4, 2); }},
      {"count zero", [](S& s) { s.set_count(5, 0); }},
      {"all counts zero", [](S& s) { s.image.zero(S::kRefcountBlock, S::kCluster); }},
      {"count of metadata zero", [](S& s) { s.set_count(1, 0); }},
      {"count too low",
       [](S& s) {
         s.set_l2(1, s.l2(0));
         s.set_l2(2, s.l2(0));
         s.set_count(5, 2);
       }},
      {"COPIED missing", [](S& s) { s.set_l2(0, S::kData); }},
      {"COPIED missing in L1", [](S& s) { s.set_l1(S::kL2); }},
      {"COPIED on a shared cluster",
       [](S& s) {
         s.set_l2(2, s.l2(0));
         s.set_count(5, 2);
       }},
      {"two guest clusters on one host cluster", [](S& s) { s.set_l2(1, s.l2(0)); }},
      {"compressed with COPIED", [](S& s) { s.set_l2(0, kCompressedBit | kCopiedBit | S::kData); }},
      {"compressed over data", [](S& s) { s.set_l2(2, kCompressedBit | S::kData); }},
      {"unaligned zero cluster", [](S& s) { s.set_l2(0, s.l2(0) | 0x201); }, true},
      {"reserved bits", [](S& s) { s.set_l2(0, s.l2(0) | 2); }, true},
      {"unaligned", [](S& s) { s.set_l2(0, s.l2(0) | 0x200); }, true},
      {"unaligned, in another one's cluster", [](S& s) { s.set_l2(2, s.l2(0) | 0x200); }, true},
      {"past the end of the file", [](S& s) { s.set_l2(0, 0x10000000); }, true},
      {"compressed past the end of the file", [](S& s) { s.set_l2(2, kCompressedBit | 0x10000000); }, true},
      {"L1 reserved bits", [](S& s) { s.set_l1(s.l1() | 1); }},
      {"L1 unaligned", [](S& s) { s.set_l1(s.l1() | 0x200); }, true},
      {"L1 unaligned, without a table before it", [](S& s) { s.set_l1(0x90200); }, true},
      {"L1 past the end of the file", [](S& s) { s.set_l1(0x10000000); }, true},
      {"the file's end lost", [](S& s) { s.image.resize(S::kEnd - 2 * S::kCluster); }, true},
      {"points at a refcount block", [](S& s) { s.set_l2(0, S::kRefcountBlock | kCopiedBit); }},
      {"points at the refcount table",
       [](S& s) {
         s.set_l2(0, S::kRefcountTable | kCopiedBit);
         poke<uint64_t>(s.image, S::kRefcountTable, 0);
       }},
      {"refcount table entry with reserved bits", [](S& s) { poke<uint64_t>(s.image, S::kRefcountTable, 0x20001); }},
      {"refcount table entry unaligned", [](S& s) { poke<uint64_t>(s.image, S::kRefcountTable, 0x20200); }},
      {"refcount block missing", [](S& s) { poke<uint64_t>(s.image, S::kRefcountTable, 0); }},
      {"refcount block past the end of the file", [](S& s) { poke<uint64_t>(s.image, S::kRefcountTable, 0x10000000); }},
      {"refcount block twice", [](S& s) { poke<uint64_t>(s.image, S::kRefcountTable + 8, 0x20000); }},
      {"refcount block in data", [](S& s) { poke<uint64_t>(s.image, S::kRefcountTable + 8, S::kData); }},
      {"refcount block is the L1 table", [](S& s) { poke<uint64_t>(s.image, S::kRefcountTable, S::kL1); }},
      {"no refcount table", [](S& s) { poke<uint32_t>(s.image, 56, 0); }},
      {"refcount table over the header", [](S& s) { poke<uint64_t>(s.image, 48, 0); }},
      {"refcount table on the L1 table", [](S& s) { poke<uint64_t>(s.image, 48, S::kL1); }},
      {"refcount table past the end of the file", [](S& s) { poke<uint64_t>(s.image, 48, 0x40000000); }},
      {"refcount table cut off by the end of the file", [](S& s) { poke<uint32_t>(s.image, 56, 100); }},
      {"refcount table full of noise", [](S& s) { s.image.write(S::kRefcountTable, pattern(S::kCluster)); }},
      {"refcount block full of noise", [](S& s) { s.image.write(S::kRefcountBlock, pattern(S::kCluster)); }},
      {"dirty, with stale counts",
       [](S& s) {
         poke<uint64_t>(s.image, 72, 1);
         s.set_count(6, 0);
         s.set_count(7, 9);
       }},
      {"marked corrupt", [](S& s) { poke<uint64_t>(s.image, 72, 3); }},
      {"extended: allocated and zero",
       [](S& s) {
         extend(s);
         poke<uint32_t>(s.image, S::kL2 + 8, 4);
       },
       true},
      {"extended: allocated without an offset",
       [](S& s) {
         extend(s);
         poke<uint64_t>(s.image, S::kL2 + 72, 9);
       },
       true},
      {"extended: past the end of the file",
       [](S& s) {
         extend(s);
         poke<uint64_t>(s.image, S::kL2, 0x10000000);
       },
       true},
      {"extended: compressed with subclusters",
       [](S& s) {
         extend(s);
         poke<uint64_t>(s.image, S::kL2, kCompressedBit | S::kData);
       },
       true},
      {"extended: COPIED missing",
       [](S& s) {
         extend(s);
         poke<uint64_t>(s.image, S::kL2, S::kData);
       }},
      {"extended: unaligned",
       [](S& s) {
         extend(s);
         poke<uint64_t>(s.image, S::kL2, S::kData + 0x200);
       },
       true},
      {"extended: refcount block missing",
       [](S& s) {
         extend(s);
         poke<uint64_t>(s.image, S::kRefcountTable, 0);
       }},
      {"data file: another place, and not COPIED",
       [](S& s) {
         keep_data_apart(s);
         poke<uint64_t>(s.image, S::kL2 + 8, 0x90000);
       },
       true},
      {"data file: compressed",
       [](S& s) {
         keep_data_apart(s);
         poke<uint64_t>(s.image, S::kL2 + 8, kCompressedBit);
       },
       true},
  };
  return list;
}

}  // namespace imgfuse::test
