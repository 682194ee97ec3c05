#include <doctest/doctest.h>

#include "unit/job/disks.h"

namespace imgfuse::test {
namespace {

Measurement measured(const CreateOptions& options) { return must(measure(nullptr, options)); }

}  // namespace

TEST_CASE("measure: a raw image is as long as its disk") {
  CHECK(measured({.format = "raw", .size = 1000}).required == 1024);
  JobDisk disk = qcow2_disk({.size = 3_MiB});
  CHECK(must(measure(&*disk, {.format = "raw"})).fully_allocated == 3_MiB);
}

TEST_CASE("measure: an empty qcow2 image has its header, tables and counts") {
  // Header, refcount table, refcount block, L1 table; an L2 table and the data come with it in full.
  CHECK(measured({.size = 64_MiB}).required == 5 * 65536);
  CHECK(measured({.size = 64_MiB}).fully_allocated == 5 * 65536 + 64_MiB);
}

TEST_CASE("measure: a source counts by the target's clusters that hold its data") {
  JobDisk source = raw_disk(64_MiB);
  must(source->write(GuestOffset(60_KiB), pattern(8_KiB)));
  must(source->write(GuestOffset(72_KiB), pattern(4_KiB)));
  must(source->write(GuestOffset(1_MiB), pattern(4_KiB)));

  const uint64_t metadata = measured({.size = 64_MiB}).required;

  CHECK(must(measure(&*source, {})).required == metadata + 3 * 65536);
  CHECK(must(measure(&*source, {.preallocation = Preallocation::full})).required == metadata + 64_MiB);
  CHECK(must(measure(&*source, {.backing_file = "base"})).required == metadata + 64_MiB);
}

TEST_CASE("measure: what cannot be made is refused") {
  for (const CreateOptions& bad :
       {CreateOptions{.size = 1, .cluster_size = 0}, CreateOptions{.size = 1, .refcount_bits = 0},
        CreateOptions{.size = uint64_t{INT64_MAX}}, CreateOptions{.format = "vmdk", .size = 1}, CreateOptions{}})
    CHECK(!measure(nullptr, bad));
}

}  // namespace imgfuse::test
