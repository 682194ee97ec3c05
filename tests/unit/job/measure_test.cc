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

TEST_CASE("measure: an empty QED image has its header and its L1 table") {
  const uint64_t header_and_l1 = 5 * 65536, table = 4 * 65536;
  CHECK(measured({.format = "qed", .size = 3_GiB}).required == header_and_l1);
  CHECK(measured({.format = "qed", .size = 3_GiB}).fully_allocated == header_and_l1 + 2 * table + 3_GiB);

  JobDisk source = raw_disk(64_MiB);
  must(source->write(GuestOffset(60_KiB), pattern(8_KiB)));
  CHECK(must(measure(&*source, {.format = "qed"})).required == header_and_l1 + table + 2 * 65536);
  CHECK(must(measure(&*source, {.format = "qed", .backing_file = "base"})).required == header_and_l1 + table + 64_MiB);
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
        CreateOptions{.size = uint64_t{INT64_MAX}}, CreateOptions{.format = "vmdk", .size = 1}, CreateOptions{},
        CreateOptions{.format = "qed", .size = uint64_t{INT64_MAX}},
        CreateOptions{.format = "qed", .size = 1, .cluster_size = 512},
        CreateOptions{.format = "qed", .size = 1, .table_size = 1u << 31},
        CreateOptions{.format = "qed", .size = 2_GiB, .cluster_size = 4096, .table_size = 1}})
    CHECK(!measure(nullptr, bad));
}

}  // namespace imgfuse::test
