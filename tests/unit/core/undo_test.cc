#include "core/undo_storage.h"

#include <doctest/doctest.h>

#include <functional>
#include <string>

#include "support/crash_storage.h"
#include "support/fault_storage.h"
#include "support/mem_storage.h"
#include "support/must.h"
#include "support/random.h"

using namespace imgfuse;
using namespace imgfuse::test;

namespace {

using State = UndoJournal::State;

constexpr uint64_t kSize = 300000;  // not a whole number of sectors, and the samples of both ends overlap nothing

MemImage original() {
  MemImage image;
  image.resize(kSize);
  image.write(1000, pattern(100000));
  image.write(200000, pattern(100000));
  return image;
}

std::vector<std::byte> content(const MemImage& image) {
  std::vector<std::byte> bytes(image.size());
  image.read(0, bytes);
  return bytes;
}

/// Changes of every kind, some on top of others, some past the end.
Result<> change(Storage& storage, Rng& rng, int changes) {
  for (int i = 0; i < changes; ++i) {
    const uint64_t offset = rng.below(kSize + 50000);
    const HostRange range{HostOffset(offset), rng.between(1, 20000)};
    switch (rng.below(8)) {
      case 0:
        IMG_TRY(storage.write_zeroes(range));
        break;
      case 1:
        IMG_TRY(storage.discard(range));
        break;
      case 2:
        IMG_TRY(storage.resize(kSize - 10000 + rng.below(40000)));
        break;
      case 3:
        IMG_TRY(storage.flush());
        break;
      default: {
        const auto bytes = pattern(range.length);
        const ConstBytes parts[] = {ConstBytes(bytes).first(bytes.size() / 3),
                                    ConstBytes(bytes).subspan(bytes.size() / 3)};
        IMG_TRY(storage.write(range.begin, parts));
      }
    }
  }
  return storage.flush();
}

struct Changed {
  std::shared_ptr<MemStorage> image = std::make_shared<MemStorage>(original());
  std::shared_ptr<MemStorage> file = std::make_shared<MemStorage>();
};

/// An image with finished changes, and their journal.
Changed changed(uint64_t seed, uint64_t modified = 7) {
  Changed result;
  Rng rng(seed);
  UndoJournal journal = must(UndoJournal::create(*result.file, *result.image));
  UndoStorage storage(*result.image, journal);
  must(change(storage, rng, 20));
  must(storage.finish(modified));
  return result;
}

Result<UndoReport> undo(Storage& image, Storage& file, uint64_t modified = 7) {
  IMG_LET(UndoJournal journal, UndoJournal::open(file));
  return undo_changes(image, journal, modified);
}

}  // namespace

TEST_CASE("undo: whatever was changed, the old bytes and the old size come back") {
  for (uint64_t run = 0; run < 50; ++run) {
    CAPTURE(base_seed());
    CAPTURE(run);
    Changed after = changed(base_seed() + run);

    must(undo(*after.image, *after.file));

    CHECK(content(after.image->image()) == content(original()));
  }
}

TEST_CASE("undo: bytes that stay what they are are not recorded, and those that change are recorded once") {
  MemStorage image(original());
  MemStorage file;
  UndoJournal journal = must(UndoJournal::create(file, image));
  UndoStorage storage(image, journal);
  std::vector<std::byte> bytes = content(original());

  must(storage.write(HostOffset(0), bytes));
  CHECK(journal.pieces().empty());

  bytes[150000] ^= std::byte{1};
  must(storage.write(HostOffset(0), bytes));
  must(storage.write(HostOffset(150000), pattern(1)));
  REQUIRE(journal.pieces().size() == 1);
  CHECK(journal.pieces()[0].range == HostRange{HostOffset(149504), 512});

  must(storage.write(HostOffset(kSize), pattern(5000)));  // cut off by undoing
  CHECK(journal.pieces().size() == 1);
}

TEST_CASE("undo: refuses what would not give the image back, and changes nothing") {
  Changed after = changed(1);
  const auto refusal = [&](Storage& image, uint64_t modified = 7) {
    const uint64_t before = after.file->counts().writes;
    const auto result = undo(image, *after.file, modified);
    REQUIRE_FALSE(result);
    CHECK(after.file->counts().writes == before);
    return result.error().text();
  };
  SUBCASE("another image") {
    MemImage other = after.image->image();
    other.write(kSize / 2 - 1000, pattern(2000));
    other.write(100, pattern(10));
    MemStorage storage(other);
    CHECK(refusal(storage).find("does not belong to this image: its beginning differs") != std::string::npos);
  }
  SUBCASE("a shorter image") {
    MemImage other = after.image->image();
    other.resize(1000);
    MemStorage storage(other);
    CHECK(refusal(storage).find("does not belong to this image: its beginning differs") != std::string::npos);
  }
  SUBCASE("changed since, where the repair had changed it") {
    const UndoJournal journal = must(UndoJournal::open(*after.file));
    must(after.image->write(journal.pieces()[0].range.begin, pattern(3)));
    CHECK(refusal(*after.image).find("has been changed since the repair") != std::string::npos);
  }
  SUBCASE("grown since") {
    must(after.image->resize(must(after.image->size()) + 512));
    CHECK(refusal(*after.image).find("has been changed since the repair") != std::string::npos);
  }
  SUBCASE("written to since, anywhere") {
    CHECK(refusal(*after.image, 8).find("has been changed since the repair") != std::string::npos);
  }
  SUBCASE("undone already") {
    must(undo(*after.image, *after.file));
    CHECK(refusal(*after.image).find("was taken back already") != std::string::npos);
  }
  SUBCASE("not a journal") {
    MemStorage empty;
    CHECK(undo(*after.image, empty).error().text() == "it is not an undo journal");
  }
}

TEST_CASE("undo: a journal that is damaged before its end is refused, wherever the damage is") {
  MemStorage image(original());
  MemStorage file;
  UndoJournal journal = must(UndoJournal::create(file, image));
  for (int i = 0; i < 20; ++i) must(journal.add(HostOffset(0), pattern(UndoJournal::kMaxPiece / 4)));  // any content
  const MemImage whole = file.image();
  Rng rng(base_seed());
  for (int run = 0; run < 100; ++run) {
    MemImage damaged = whole;
    const uint64_t at = rng.below(whole.size() - UndoJournal::kMaxUnflushed / 8);
    std::byte byte{};
    damaged.read(at, {&byte, 1});
    byte ^= std::byte{1} << rng.below(8);
    damaged.write(at, {&byte, 1});
    MemStorage storage(damaged);
    const auto opened = UndoJournal::open(storage);
    // Where the rest could be what a crash tore, fewer pieces are taken.
    if (opened) CHECK(opened->pieces().size() < 20);
  }
}

TEST_CASE("undo: after a crash at any moment of a change, what was done can be taken back") {
  for (uint64_t run = 0; run < 4; ++run) {
    CAPTURE(base_seed());
    CAPTURE(run);
    Rng rng(base_seed() + run);
    CrashStorage image(original());
    CrashStorage file{MemImage()};
    UndoJournal journal = must(UndoJournal::create(file, image));
    const auto expect_undone = [&] {
      for (const CrashMode image_mode : kCrashModes) {
        for (const CrashMode file_mode : kCrashModes) {
          MemStorage left(image.crash(image_mode, rng));
          MemStorage left_file(file.crash(file_mode, rng));
          UndoJournal left_journal = must(UndoJournal::open(left_file));
          if (left_journal.state() == State::finished) continue;  // the image is durable then, too
          must(undo_changes(left, left_journal, 7));
          CHECK(content(left.image()) == content(original()));
        }
      }
    };
    image.set_observer(expect_undone);
    file.set_observer(expect_undone);
    UndoStorage storage(image, journal);
    must(change(storage, rng, 12));
    must(storage.finish(7));
  }
}

TEST_CASE("undo: after a crash at any moment of undoing, it is repeated") {
  Changed after = changed(base_seed());
  CAPTURE(base_seed());
  Rng rng(base_seed());
  CrashStorage image(after.image->image());
  CrashStorage file(after.file->image());
  const auto expect_undone = [&] {
    for (const CrashMode image_mode : kCrashModes) {
      for (const CrashMode file_mode : kCrashModes) {
        MemStorage left(image.crash(image_mode, rng));
        MemStorage left_file(file.crash(file_mode, rng));
        UndoJournal journal = must(UndoJournal::open(left_file));
        if (journal.state() != State::undone) must(undo_changes(left, journal, journal.left().modified));
        CHECK(content(left.image()) == content(original()));
      }
    }
  };
  image.set_observer(expect_undone);
  file.set_observer(expect_undone);
  must(undo(image, file));
}

TEST_CASE("undo: a change is not made when its old bytes cannot be kept") {
  for (uint64_t n = 1;; n += fault_step()) {
    CAPTURE(n);
    auto image = std::make_shared<MemStorage>(original());
    auto file_memory = std::make_shared<MemStorage>();
    FaultStorage file(file_memory);
    UndoJournal journal = must(UndoJournal::create(file, *image));
    UndoStorage storage(*image, journal);
    Rng rng(n);

    file.fail_call(n, ErrorCode::no_space, {.calls = Call::write | Call::flush, .torn = true});
    const auto result = change(storage, rng, 12);

    CHECK(result.has_value() != file.fired());
    must(undo(*image, *file_memory));
    CHECK(content(image->image()) == content(original()));
    if (!file.fired()) break;
  }
}
