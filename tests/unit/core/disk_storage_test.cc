#include "core/disk_storage.h"

#include <doctest/doctest.h>

#include "support/builders.h"

namespace imgfuse::test {
namespace {

std::shared_ptr<DiskStorage> over(const std::shared_ptr<MemStorage>& image, bool read_only = false) {
  return std::make_shared<DiskStorage>(must(open_qcow2(image, {.read_only = read_only})));
}

}  // namespace

TEST_CASE("disk storage: what is written past the end of the disk makes it longer, in whole sectors") {
  const auto image = std::make_shared<MemStorage>(make_qcow2({.size = 65536}));
  {
    const auto storage = over(image);
    const std::vector<std::byte> front = pattern(100, 1), back = pattern(1000, 2);

    must(storage->write(HostOffset(100000), std::array<ConstBytes, 2>{front, back}));

    CHECK(must(storage->size()) == 101376);
    std::vector<std::byte> bytes(5000), wanted = front;
    wanted.insert(wanted.end(), back.begin(), back.end());
    wanted.resize(5000);
    must(storage->read(HostOffset(100000), bytes));
    CHECK(bytes == wanted);
    must(storage->flush());
  }
  CHECK(check_image(image->image()).clean());  // it was closed
}

TEST_CASE("disk storage: extents tell data from holes, and all behind the end is a hole") {
  const auto storage = over(std::make_shared<MemStorage>(make_qcow2({.size = 4 * 65536})));
  must(storage->write(HostOffset(65536), pattern(65536)));

  CHECK(must(storage->extent({HostOffset(0), 1_MiB})).length == 65536);
  CHECK_FALSE(must(storage->extent({HostOffset(0), 1_MiB})).data);
  CHECK(must(storage->extent({HostOffset(65536), 1_MiB})).data);
  const StorageExtent rest = must(storage->extent({HostOffset(2 * 65536), 1_MiB}));
  CHECK(rest.length == 1_MiB);
  CHECK_FALSE(rest.data);
}

TEST_CASE("disk storage: discarded ranges read as zeros, and discarding never makes the disk longer") {
  const auto storage = over(std::make_shared<MemStorage>(make_qcow2({.size = 4 * 65536})));
  must(storage->write(HostOffset(0), pattern(2 * 65536)));

  must(storage->discard({HostOffset(1000), 1_MiB}));

  CHECK(must(storage->size()) == 4 * 65536);
  std::vector<std::byte> bytes(65536), wanted = pattern(2 * 65536);
  wanted.resize(65536);
  std::fill(wanted.begin() + 1000, wanted.end(), std::byte{0});
  must(storage->read(HostOffset(0), bytes));
  CHECK(bytes == wanted);
}

TEST_CASE("disk storage: a disk that is read-only is storage that is not writable") {
  const auto storage = over(std::make_shared<MemStorage>(make_qcow2({.size = 65536})), true);

  CHECK_FALSE(storage->info().writable);
  CHECK_FALSE(storage->info().extensible);
  CHECK_FALSE(storage->write(HostOffset(0), pattern(512)));
}

}  // namespace imgfuse::test
