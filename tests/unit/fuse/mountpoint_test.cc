#include "fuse/mountpoint.h"

#include <doctest/doctest.h>

#include "mounted.h"

namespace imgfuse::fuse {
namespace {

TEST_CASE("mount point: a missing one is an error that says what to do") {
  const TemporaryFolder folder;
  const std::string path = folder.path() + "/missing";

  const auto checked = check_mountpoint(path, "/image");

  REQUIRE(!checked);
  CHECK(checked.error().code() == ErrorCode::not_found);
  CHECK(checked.error().text().find("touch " + path) != std::string::npos);
  CHECK(checked.error().text().find("mkdir " + path) != std::string::npos);
}

TEST_CASE("mount point: files and directories are told apart, links followed, other things refused") {
  const TemporaryFolder folder;
  std::ofstream(folder.path() + "/file");
  std::filesystem::create_symlink("file", folder.path() + "/link");

  const auto file = check_mountpoint(folder.path() + "/link", "/image");
  const auto directory = check_mountpoint(folder.path() + "/", "/image");
  const auto device = check_mountpoint("/dev/null", "/image");

  REQUIRE(file);
  CHECK(file->kind == MountpointKind::file);
  CHECK(file->path == folder.path() + "/file");
  REQUIRE(directory);
  CHECK(directory->kind == MountpointKind::directory);
  CHECK(directory->path == folder.path());
  REQUIRE(!device);
  CHECK(device.error().text() == "mount point /dev/null is neither a file nor a directory");
}

TEST_CASE("mount point: it may be the image, but not a directory above it, nor below a file") {
  const TemporaryFolder folder;
  const std::string image = folder.path() + "/image";
  std::ofstream(image) << "x";

  CHECK(check_mountpoint(image, image));
  CHECK(!check_mountpoint(folder.path(), image));
  const auto below = check_mountpoint(image + "/point", image);
  REQUIRE(!below);
  CHECK(below.error().text() == "mount point " + image + "/point: Not a directory");
}

}  // namespace
}  // namespace imgfuse::fuse
