// What a crash or a failing host leaves of a repair, and of taking one back.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "core/undo_storage.h"
#include "mendable.h"
#include "support/crash_storage.h"
#include "support/fault_storage.h"

using namespace imgfuse;
using namespace imgfuse::test;

namespace {

using S = Sample;

bool same_bytes(const MemImage& one, const MemImage& other) {
  if (one.size() != other.size()) return false;
  std::vector<std::byte> bytes[2] = {std::vector<std::byte>(one.size()), std::vector<std::byte>(other.size())};
  one.read(0, bytes[0]);
  other.read(0, bytes[1]);
  return bytes[0] == bytes[1];
}

}  // namespace

TEST_CASE("qcow2 repair: no crash makes it worse, and a second repair finishes it") {
  for (const Damage& damage : mendable()) {
    CAPTURE(std::string(damage.name));
    CAPTURE(base_seed());
    S sample;
    damage.make(sample);
    const MemImage whole = repaired(sample.image, Repair::all).image;
    Rng rng(base_seed());
    CrashStorage storage(sample.image);
    storage.set_observer([&] {
      for (const CrashMode mode : kCrashModes) {
        const MemImage left = storage.crash(mode, rng);
        // Nothing is believed clean that is not.
        const bool was_marked = (peek<uint64_t>(sample.image, 72) & 3) != 0;
        if (was_marked && (peek<uint64_t>(left, 72) & 3) == 0) CHECK(check_image(left).clean());

        const Repaired again = repaired(left, Repair::all);
        CHECK(again.report.clean());
        CHECK(mapping(again.image) == mapping(whole));
      }
    });
    must(qcow2::check(storage, Repair::all, {}));
  }
}

TEST_CASE("qcow2 repair: a failing host call is an error, and a later repair finishes") {
  for (const Damage& damage : mendable()) {
    CAPTURE(std::string(damage.name));
    S sample;
    damage.make(sample);
    for (uint64_t n = 1;; n += fault_step()) {
      auto memory = std::make_shared<MemStorage>(sample.image);
      FaultStorage storage(memory);
      storage.fail_call(n, ErrorCode::io,
                        {.calls = Call::write | Call::flush | Call::zero | Call::resize, .torn = true});
      const auto result = qcow2::check(storage, Repair::all, {});
      if (!storage.fired()) break;
      CHECK_FALSE(result);
      CHECK(repaired(memory->image(), Repair::all).report.clean());
    }
  }
}

TEST_CASE("qcow2 repair: after a crash at any moment of a repair with an undo file, it can be taken back") {
  for (const Damage& damage : mendable()) {
    CAPTURE(std::string(damage.name));
    CAPTURE(base_seed());
    S sample;
    damage.make(sample);
    Rng rng(base_seed());
    CrashStorage image(sample.image);
    CrashStorage file{MemImage()};
    UndoJournal journal = must(UndoJournal::create(file, image));
    const auto expect_undone = [&] {
      for (const CrashMode mode : kCrashModes) {
        MemStorage left(image.crash(mode, rng));
        MemStorage left_file(file.crash(kCrashModes[rng.below(std::size(kCrashModes))], rng));
        UndoJournal left_journal = must(UndoJournal::open(left_file));
        must(undo_changes(left, left_journal, left_journal.left().modified));
        CHECK(same_bytes(left.image(), sample.image));
      }
    };
    image.set_observer(expect_undone);
    file.set_observer(expect_undone);
    UndoStorage storage(image, journal);
    must(qcow2::check(storage, Repair::all, {}));
    must(storage.finish(1));
  }
}
