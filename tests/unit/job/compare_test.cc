#include <doctest/doctest.h>

#include "unit/job/disks.h"

namespace imgfuse::test {

TEST_CASE("compare: a copy in another format is the same") {
  Rng rng(base_seed());
  JobDisk a = raw_disk(9_MiB + 1024);
  scribble(*a, rng);
  JobDisk b = qcow2_disk({.size = 9_MiB + 1024, .cluster_size = 4096});
  must(convert(*a, *b, {}));

  const Comparison comparison = compare(*a, *b, {});

  CHECK(comparison.verdict == Verdict::same);
  CHECK(!comparison.sizes_differ);
}

TEST_CASE("compare: the first of several differences is found, wherever it lies") {
  Rng rng(base_seed());
  for (int round = 0; round < 40; ++round) {
    JobDisk a = qcow2_disk({.size = 20_MiB});
    must(a->write(GuestOffset(0), pattern(12_MiB)));
    JobDisk b = raw_disk(20_MiB);
    must(convert(*a, *b, {}));
    uint64_t first = ~uint64_t{0};
    for (int i = 0; i < 3; ++i) {
      const uint64_t at = rng.below(20_MiB);
      std::byte byte;
      must(a->read(GuestOffset(at), Bytes(&byte, 1)));
      byte ^= std::byte{1};
      must((round % 2 ? a : b)->write(GuestOffset(at), Bytes(&byte, 1)));
      first = std::min(first, at);
    }

    const Comparison comparison = compare(*a, *b, {.workers = 8});

    CHECK(comparison.verdict == Verdict::content_differs);
    CHECK(comparison.offset == first);
  }
}

TEST_CASE("compare: a longer disk is the same if the rest of it is zero, except strictly") {
  JobDisk a = raw_disk(1_MiB);
  JobDisk b = qcow2_disk({.size = 3_MiB});
  for (const auto& [x, y] : {std::pair{&a, &b}, std::pair{&b, &a}}) {
    const Comparison comparison = compare(**x, **y, {});
    CHECK(comparison.verdict == Verdict::same);
    CHECK(comparison.sizes_differ);
    CHECK(compare(**x, **y, {.strict = true}).verdict == Verdict::size_differs);
  }

  must(b->write(GuestOffset(2_MiB + 7), pattern(1)));

  CHECK(compare(*a, *b, {}).verdict == Verdict::content_differs);
  CHECK(compare(*a, *b, {}).offset == 2_MiB + 7);
}

TEST_CASE("compare: strictly, zeros that are stored are not the same as a hole") {
  JobDisk a = qcow2_disk({.size = 4_MiB});
  JobDisk b = qcow2_disk({.size = 4_MiB});
  CHECK(compare(*a, *b, {.strict = true}).verdict == Verdict::same);

  must(a->write_zeroes({GuestOffset(1_MiB), 64_KiB}, Zeroing::may_free));
  must(a->write(GuestOffset(2_MiB), std::vector<std::byte>(64_KiB)));

  CHECK(compare(*a, *b, {}).verdict == Verdict::same);
  const Comparison strict = compare(*a, *b, {.strict = true});
  CHECK(strict.verdict == Verdict::allocation_differs);
  CHECK(strict.offset == 2_MiB);
}

TEST_CASE("compare: what cannot be read is told, at its place") {
  JobDisk a = raw_disk(8_MiB);
  must(a->write(GuestOffset(0), pattern(8_MiB)));
  JobDisk b = raw_disk(8_MiB);
  must(convert(*a, *b, {}));
  b.faults->fail_call(3, ErrorCode::io, {.calls = Call::read, .later = true});

  const Comparison comparison = compare(*a, *b, {.workers = 1});

  CHECK(comparison.verdict == Verdict::read_failed);
  CHECK(comparison.offset == 2_MiB);
  REQUIRE(comparison.error);
  CHECK(comparison.error->code() == ErrorCode::io);

  b.faults->fail_call(1, ErrorCode::io, {.calls = Call::query, .later = true});
  CHECK(compare(*a, *b, {}).verdict == Verdict::map_failed);
}

}  // namespace imgfuse::test
