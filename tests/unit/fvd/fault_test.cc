// The host fails: what FVD has more than other formats. Of what they share, qcow2/fault_test.cc has the tests.
#include <doctest/doctest.h>

#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/fault_storage.h"
#include "support/model_disk.h"
#include "unit/qcow2/faults.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kChunk = 8192;

/// With a journal of eight sectors, if there is one.
Situation situation(bool compact, bool with_base, bool journal, bool data_file = false) {
  Situation s;
  FvdSpec spec{.size = Situation::kSize, .base = with_base, .base_size = with_base ? 256_KiB + 512 : 0};
  spec.own.compact = compact;
  spec.own.chunk_size = kChunk;
  if (with_base) spec.own.block_size = 4096;
  spec.own.storage_grow_unit = 65536;
  spec.own.journal = journal;
  if (journal) spec.own.journal_size = 4096;
  if (data_file) {
    spec.data_file = "data.raw";
    s.data = MemImage();
  }
  s.image = make_fvd(spec);
  s.backing.resize(spec.base_size);
  if (with_base) s.backing.write(0, pattern(256_KiB, 9));
  s.content = s.backing;
  s.content.resize(Situation::kSize);
  return s;
}

const Operation kCopyAndWrite{"a copy from the base, and a write into it",
                              [](Disk& disk, ModelDisk& model) -> Result<> {
                                IMG_TRY(disk.populate({GuestOffset(0), 8 * kChunk}));
                                return write(disk, model, 2 * kChunk + 512, 512, 5);
                              }};
const Operation kManyFlushes{"more flushes than the journal has sectors", [](Disk& disk, ModelDisk& model) -> Result<> {
                               for (uint64_t i = 0; i < 9; ++i) {
                                 IMG_TRY(write(disk, model, i * kChunk + 1024, 512, i));
                                 IMG_TRY(flush(disk, model));
                               }
                               return {};
                             }};

}  // namespace

TEST_CASE("fvd: a copy from the base that is made durable may fail at any call") {
  for (const bool compact : {false, true})
    for (const bool journal : {false, true}) {
      CAPTURE(compact);
      CAPTURE(journal);
      fail_everywhere(situation(compact, true, journal), kCopyAndWrite);
    }
}

TEST_CASE("fvd: a checkpoint may fail at any call") {
  fail_everywhere(situation(true, true, true), kManyFlushes);
  fail_everywhere(situation(true, false, false), kManyFlushes);
  fail_everywhere(situation(false, true, true), kManyFlushes);
}

TEST_CASE("fvd: with data in a file of their own either file may fail at any call") {
  fail_everywhere(situation(true, true, true, true), kManyFlushes);
  fail_everywhere(situation(true, true, true, true), kCopyAndWrite);
}

TEST_CASE("fvd: an open for writing that fails in any call leaves what another one can recover") {
  Situation s = situation(true, true, true);
  ModelDisk model = model_of(s);
  const auto memory = std::make_shared<MemStorage>(s.image);
  auto disk = must(open_fvd(memory, {.backing = s.backing}));
  must(write(*disk, model, 5000, 60000, 1));
  must(flush(*disk, model));
  const MemImage crashed = memory->image();
  must(disk->close());
  for (const bool later : {false, true})
    for (uint64_t n = 1;; ++n) {
      CAPTURE(later);
      CAPTURE(n);
      Rng rng(n);
      const auto crash = std::make_shared<CrashStorage>(crashed);
      const auto faults = std::make_shared<FaultStorage>(crash);
      faults->fail_call(n, ErrorCode::io, {.torn = !later, .later = later});
      auto opened = open_fvd(faults, {.backing = s.backing});
      const bool fired = faults->fired();
      faults->heal();
      if (opened) (void)(*opened)->close();
      check_crashed(*crash, model, s, rng);
      if (!fired) break;
    }
}

}  // namespace imgfuse::test
