#include <doctest/doctest.h>

#include "job/crew.h"
#include "unit/job/disks.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kSize = 7_MiB + 512 * 3;

/// Targets of all kinds that are at least `size` long.
std::vector<std::function<JobDisk()>> targets(uint64_t size) {
  return {
      [=] { return raw_disk(size); },
      [=] { return qcow2_disk({.size = size, .cluster_size = 512}); },
      [=] { return qcow2_disk({.size = size, .version = 2}); },
      [=] { return qcow2_disk({.size = size + 64_KiB, .cluster_size = 2_MiB}); },
      [=] { return disk_of(make_qed({.size = size, .cluster_size = 4096, .table_size = 2})); },
  };
}

uint64_t allocated_bytes(const JobDisk& disk) { return disk.memory->image().allocated(); }

}  // namespace

TEST_CASE("convert: any disk is copied to any other, whatever lies in the target before") {
  Rng rng(base_seed());
  for (size_t round = 0; round < targets(kSize).size(); ++round) {
    for (const bool fresh : {true, false}) {
      CAPTURE(round);
      CAPTURE(fresh);
      const ImageSpec spec{.size = kSize, .cluster_size = 4096, .backing = "base"};
      JobDisk source = round % 2 == 0 ? raw_disk(kSize)
                                      : disk_of(round == 1 ? QedKind::image(spec) : Qcow2Kind::image(spec),
                                                scribbled_image(5_MiB + 100, rng));
      scribble(*source, rng);
      JobDisk target = targets(kSize)[round]();
      if (!fresh) scribble(*target, rng);

      must(convert(*source, *target, {.target_is_zero = fresh, .workers = 3}));

      CHECK(read_all(*target, GuestOffset(0), kSize) == content(*source));
    }
  }
}

TEST_CASE("convert: what lies behind the source's end in a longer target stays") {
  JobDisk source = raw_disk(1_MiB);
  JobDisk target = qcow2_disk({.size = 2_MiB});
  must(target->write(GuestOffset(1_MiB), pattern(1_MiB, 3)));

  must(convert(*source, *target, {}));

  CHECK(read_all(*target, GuestOffset(1_MiB), 1_MiB) == pattern(1_MiB, 3));
}

TEST_CASE("convert: a target that is too short is refused, and nothing is written") {
  JobDisk source = raw_disk(1_MiB + 512);
  JobDisk target = raw_disk(1_MiB);

  CHECK(convert(*source, *target, {}).error().code() == ErrorCode::invalid);
  CHECK(convert(*target, *source, {.target_offset = 1024}).error().code() == ErrorCode::invalid);
  CHECK(target.memory->counts().writes + target.memory->counts().zeroes == 0);
}

TEST_CASE("convert: several sources lie one behind the other, wherever their ends are") {
  Rng rng(base_seed());
  JobDisk first = raw_disk(3_MiB + 512);
  JobDisk second = raw_disk(2_MiB - 512);
  scribble(*first, rng);
  scribble(*second, rng);
  JobDisk target = qcow2_disk({.size = 5_MiB});

  must(convert(*first, *target, {.target_is_zero = true}));
  must(convert(*second, *target, {.target_offset = 3_MiB + 512, .target_is_zero = true}));

  CHECK(read_all(*target, GuestOffset(0), 3_MiB + 512) == content(*first));
  CHECK(read_all(*target, GuestOffset(3_MiB + 512), 2_MiB - 512) == content(*second));
}

TEST_CASE("convert: holes, zeros and data that is zero take no space") {
  JobDisk source = qcow2_disk({.size = 64_MiB});
  must(source->write(GuestOffset(10_MiB), std::vector<std::byte>(8_MiB)));
  must(source->write_zeroes({GuestOffset(30_MiB), 8_MiB}, Zeroing::keep_allocation));
  must(source->write(GuestOffset(40_MiB), pattern(64_KiB)));
  JobDisk target = qcow2_disk({.size = 64_MiB});
  const uint64_t before = allocated_bytes(target);

  must(convert(*source, *target, {.target_is_zero = true}));
  must(target->flush());

  CHECK(allocated_bytes(target) - before <= 64_KiB + 64_KiB);  // data and a table
  CHECK(content(*target) == content(*source));
}

TEST_CASE("convert: with sparse 0 everything takes space") {
  JobDisk source = qcow2_disk({.size = 4_MiB});
  must(source->write(GuestOffset(1_MiB), pattern(1_MiB)));
  JobDisk target = qcow2_disk({.size = 4_MiB});

  must(convert(*source, *target, {.sparse = 0, .target_is_zero = true}));

  CHECK(content(*target) == content(*source));
  for (const Extent& extent : must(target->map({GuestOffset(0), 4_MiB}))) CHECK(extent.allocated);
}

TEST_CASE("convert: with the same backing file only what the source itself holds is copied") {
  Rng rng(base_seed());
  const MemImage backing = scribbled_image(3_MiB + 5000, rng);
  JobDisk source = qcow2_disk({.size = 4_MiB, .cluster_size = 4096, .backing = "base"}, backing);
  must(source->write(GuestOffset(1_MiB), pattern(300, 1)));
  must(source->write_zeroes({GuestOffset(2_MiB), 128_KiB}, Zeroing::may_free));
  JobDisk target = qcow2_disk({.size = 4_MiB, .backing = "base"}, backing);

  must(convert(*source, *target, {.same_backing = true}));

  CHECK(content(*target) == content(*source));
  CHECK(must(target->map({GuestOffset(1_MiB), 64_KiB})).front().depth == 0);
  CHECK(must(target->map({GuestOffset(512_KiB), 64_KiB})).front().depth == 1);
}

TEST_CASE("convert: the first failure of either side ends it and is returned") {
  for (const bool fail_source : {true, false}) {
    for (uint64_t n = 1; n < 40; n += 3) {
      CAPTURE(n);
      JobDisk source = raw_disk(32_MiB);
      must(source->write(GuestOffset(0), pattern(32_MiB)));
      JobDisk target = raw_disk(32_MiB);
      JobDisk& failing = fail_source ? source : target;

      failing.faults->fail_call(n, ErrorCode::no_space, {.calls = Call::read | Call::write});
      const auto result = convert(*source, *target, {});

      if (!failing.faults->fired()) {
        CHECK(result.has_value());
        break;
      }
      REQUIRE(!result);
      CHECK(result.error().code() == ErrorCode::no_space);
    }
  }
}

TEST_CASE("convert: progress rises to the disk's size") {
  JobDisk source = raw_disk(20_MiB);
  must(source->write(GuestOffset(0), pattern(9_MiB)));
  JobDisk target = raw_disk(20_MiB);
  std::vector<uint64_t> seen;

  must(convert(*source, *target, {.target_is_zero = true}, [&](uint64_t done, uint64_t total) {
    CHECK(total == 20_MiB);
    seen.push_back(done);
  }));

  CHECK(std::is_sorted(seen.begin(), seen.end()));
  CHECK(seen.back() == 20_MiB);
}

TEST_CASE("cutter: pieces cover the disk in order, and only stretches without data are long") {
  Rng rng(base_seed());
  for (const job::Cuts cuts : {job::Cuts{1_MiB, 0}, job::Cuts{1_MiB, 512}, job::Cuts{4096, 4000}}) {
    JobDisk disk = raw_disk(40_MiB);
    must(disk->write(GuestOffset(3_MiB + 4096), pattern(2_MiB)));
    must(disk->write(GuestOffset(39_MiB), pattern(1_MiB)));
    job::Cutter cutter(*disk, {GuestOffset(0), 40_MiB}, cuts);
    GuestOffset end;

    while (const auto piece = must(cutter.next())) {
      CHECK(piece->range.begin == end);
      end = piece->range.end();
      CHECK((piece->range.length <= cuts.size || piece->extents.size() == 1));
      CHECK((end.bytes() == 40_MiB || (end.bytes() + cuts.phase) % cuts.size == 0));
      GuestOffset at = piece->range.begin;
      for (const Extent& extent : piece->extents) {
        CHECK(extent.range.begin == at);
        at = extent.range.end();
      }
      CHECK(at == end);
    }

    CHECK(end.bytes() == 40_MiB);
  }
}

}  // namespace imgfuse::test
