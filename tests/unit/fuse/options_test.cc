#include "fuse/options.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

namespace imgfuse::fuse {
namespace {

Result<bool> knows_nothing(std::string_view, const std::string&) { return false; }

std::string error_of(std::string_view list) {
  MountOptions options;
  const auto parsed = parse_options(list, options, knows_nothing);
  return parsed ? "" : parsed.error().text();
}

TEST_CASE("fuse options: flags and values are read, the last one wins") {
  MountOptions options;

  REQUIRE(parse_options("ro,allow_other,uid=1000,gid=7,umask=022,max_threads=3,,rw", options, knows_nothing));

  CHECK(options.read_only == false);
  CHECK(options.allow_other);
  CHECK(options.uid == 1000u);
  CHECK(options.gid == 7u);
  CHECK(options.umask == 022u);
  CHECK(options.max_threads == 3);
}

TEST_CASE("fuse options: a backslash makes a comma part of a value, and libfuse gets it escaped") {
  MountOptions options;

  REQUIRE(parse_options(R"(fsname=a\,b\\c=d,ro)", options, knows_nothing));

  CHECK(options.fsname == R"(a,b\c=d)");
  CHECK(options.read_only);
  CHECK(libfuse_options(options, "/image").find(R"(,fsname=a\,b\\c=d,subtype=imgfuse)") != std::string::npos);
}

TEST_CASE("fuse options: the file system's name is the image unless told otherwise") {
  CHECK(libfuse_options({}, "/a,b").find(R"(fsname=/a\,b,)") != std::string::npos);
}

TEST_CASE("fuse options: words for mount(8) and systemd are skipped") {
  CHECK(error_of("defaults,nofail,noauto,user,_netdev,x-systemd.automount,x-foo=1,comment=x,noatime,nodev,async") ==
        "");
}

TEST_CASE("fuse options: other options go to their owner with their value") {
  std::vector<std::string> seen;
  MountOptions options;
  const auto take = [&](std::string_view key, const std::string& value) -> Result<bool> {
    seen.push_back(std::string(key) + "|" + value);
    return true;
  };

  REQUIRE(parse_options("format=raw,ro,force_share", options, take));

  CHECK(seen == std::vector<std::string>{"format|raw", "force_share|"});
}

TEST_CASE("fuse options: what makes no sense is named") {
  CHECK(error_of("ro,frobnicate=1") == "unknown option -o frobnicate");
  CHECK(error_of("ro=1") == "unknown option -o ro");
  CHECK(error_of("uid=") == "option uid=: a number from 0 to 4294967294 is expected");
  CHECK(error_of("uid=-1") == "option uid=-1: a number from 0 to 4294967294 is expected");
  CHECK(error_of("uid=root") == "option uid=root: a number from 0 to 4294967294 is expected");
  CHECK(error_of("umask=08") == "option umask=08: an octal number from 0 to 777 is expected");
  CHECK(error_of("umask=1000") == "option umask=1000: an octal number from 0 to 777 is expected");
  CHECK(error_of("max_threads=0") == "option max_threads=0: a number from 1 to 1024 is expected");
  CHECK(error_of("io_uring=yes") == "option io_uring=yes: auto, on or off is expected");
  CHECK(error_of("passthrough,writeback_cache") == "option passthrough excludes writeback_cache and direct_io");
  CHECK(error_of("passthrough,direct_io") == "option passthrough excludes writeback_cache and direct_io");
  CHECK(error_of("allow_other,allow_root") == "options allow_other and allow_root exclude each other");
}

}  // namespace
}  // namespace imgfuse::fuse
