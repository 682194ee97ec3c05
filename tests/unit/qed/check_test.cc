// What a check finds and what a repair does.
#include <doctest/doctest.h>

#include "qed_bytes.h"
#include "support/crash_storage.h"

namespace imgfuse::test {
namespace {

CheckReport repaired(MemImage& image, Repair mode = Repair::all) {
  MemStorage storage(image);
  const CheckReport report = must(qed::check(storage, mode, {}));
  image = storage.image();
  return report;
}

TEST_CASE("qed: a sound image has nothing to report but its numbers") {
  QedSample s;
  const CheckReport report = check_image(s.image);
  CHECK(report.clean());
  CHECK(report.total_clusters == 16);
  CHECK(report.allocated_clusters == 3);
  CHECK(report.fragmented_clusters == 0);
}

TEST_CASE("qed: an entry that leads nowhere becomes 0, and everything else stays") {
  QedSample s;
  const MemImage content = s.content();
  s.set_l2(1, QedSample::kEnd + 65536);
  s.set_l2(2, 3);
  const CheckReport report = repaired(s.image);

  CHECK(report.corruptions == 0);
  CHECK(report.corruptions_fixed == 2);
  CHECK(report.leaks == 1);
  CHECK(s.l2(1) == 0);
  CHECK(s.l2(2) == 0);
  auto disk = must(open_image(std::make_shared<MemStorage>(s.image), {.read_only = true}));
  CHECK(read_all(*disk, GuestOffset(0), 65536) == read_all(*make_raw_disk(content), GuestOffset(0), 65536));
}

TEST_CASE("qed: what is used twice is found, and left alone") {
  QedSample s;
  s.set_l2(1, QedSample::kData);
  s.set_l2(2, QedSample::kL1);
  const MemImage before = s.image;
  const CheckReport report = repaired(s.image);

  CHECK(report.corruptions == 2);
  CHECK(report.corruptions_fixed == 0);
  CHECK(s.l2(1) == QedSample::kData);
  CHECK(s.l2(2) == QedSample::kL1);
}

TEST_CASE("qed: leaks are counted and not repaired, and do not keep NEED_CHECK") {
  QedSample s;
  s.image.resize(QedSample::kEnd + 2 * 65536 + 100);
  poke_le<uint64_t>(s.image, kFeaturesAt, 2);
  CHECK(check_image(s.image).leaks == 2);
  CHECK(features_of(s.image) == 2);

  CHECK(repaired(s.image).leaks == 2);
  CHECK(features_of(s.image) == 0);
}

TEST_CASE("qed: NEED_CHECK stays while damage is left") {
  QedSample s;
  s.set_l2(1, QedSample::kData);
  poke_le<uint64_t>(s.image, kFeaturesAt, 2);
  repaired(s.image);
  CHECK(features_of(s.image) == 2);
}

TEST_CASE("qed: a crash during a repair loses nothing that the repair keeps") {
  QedSample s;
  const MemImage content = s.content();
  s.set_l2(9, 7);
  s.set_l2(100, QedSample::kEnd);
  poke_le<uint64_t>(s.image, QedSample::kL1 + 8, 0x100000);
  poke_le<uint64_t>(s.image, kFeaturesAt, 2);
  Rng rng(1);
  auto crash = std::make_shared<CrashStorage>(s.image);
  crash->set_observer([&] {
    for (const CrashMode mode : kCrashModes) {
      MemImage left = crash->crash(mode, rng);
      CHECK(repaired(left).corruptions == 0);
      auto disk = must(open_image(std::make_shared<MemStorage>(left), {.read_only = true}));
      CHECK(read_all(*disk, GuestOffset(0), 1_MiB) == read_all(*make_raw_disk(content), GuestOffset(0), 1_MiB));
    }
  });

  CHECK(must(qed::check(*crash, Repair::all, {})).corruptions_fixed == 3);
}

}  // namespace
}  // namespace imgfuse::test
