#include <sys/stat.h>

#include <cstring>

#include "imgfuse/check.h"
#include "imgfuse/create.h"
#include "storage/file_storage.h"
#include "support/must.h"
#include "support/random.h"
#include "unit/storage/host.h"

namespace imgfuse::test {
namespace {

namespace fs = std::filesystem;

CreateOptions raw_options(uint64_t size) { return {.format = "raw", .size = size}; }

Error create_failure(const std::string& path, const CreateOptions& options) {
  const auto result = create_image(path, options);
  REQUIRE(!result);
  return result.error();
}

}  // namespace

TEST_CASE("create: a raw image has its size, rounded up to sectors") {
  const TempDir dir;

  must(create_image(dir / "disk.raw", raw_options(1000001)));

  CHECK(fs::file_size(dir / "disk.raw") == 1000448);
  must(create_image(dir / "disk.raw", raw_options(512)));  // in its place
  CHECK(fs::file_size(dir / "disk.raw") == 512);
}

TEST_CASE("create: a qcow2 image opens with the size that was asked for, and QEMU agrees") {
  const TempDir dir;
  for (const Preallocation preallocation :
       {Preallocation::off, Preallocation::metadata, Preallocation::falloc, Preallocation::full}) {
    must(create_image(dir / "disk.qcow2", {.size = 3_MiB, .preallocation = preallocation}));

    auto disk = must(open_disk(dir / "disk.qcow2", {}));
    CHECK(disk->info().format == "qcow2");
    CHECK(disk->size() == 3_MiB);
    must(disk->close());
    disk.reset();
    if (installed("qemu-img")) CHECK(run({"qemu-img", "check", dir / "disk.qcow2"}).status == 0);
  }
}

TEST_CASE("create: the size is the backing file's unless given") {
  const TempDir dir;
  make_file(dir / "base.raw", 5 * 512 + 100);

  must(create_image(dir / "top.qcow2", {.backing_file = "base.raw", .backing_format = "raw"}));
  must(create_image(dir / "larger.qcow2", {.size = 1_MiB, .backing_file = "base.raw", .backing_format = "raw"}));

  CHECK(must(image_info(dir / "top.qcow2", {})).virtual_size == 6 * 512);
  CHECK(must(image_info(dir / "larger.qcow2", {})).virtual_size == 1_MiB);
}

TEST_CASE("create: what cannot be made is refused before a file exists") {
  const TempDir dir;
  const std::string path = dir / "new";
  make_file(dir / "base.raw", 512);
  const std::vector<CreateOptions> bad{
      {},
      {.format = "vmdk", .size = 512},
      {.format = "nonsense", .size = 512},
      {.size = UINT64_MAX},
      {.size = 512, .backing_file = "base.raw"},
      {.size = 512, .backing_file = "none.raw", .backing_format = "raw"},
      {.size = 512, .backing_file = "base.raw", .backing_format = "vmdk"},
      {.size = 512, .backing_file = "base.raw", .backing_format = "qcow2"},
      {.size = 512, .backing_file = "json:{}", .backing_format = "raw"},
      {.size = 512, .backing_file = "/etc/passwd", .backing_format = "raw"},
      {.format = "raw", .size = 512, .backing_file = "base.raw", .backing_format = "raw"},
      {.format = "raw", .size = 512, .preallocation = Preallocation::metadata},
      {.size = 512, .cluster_size = 3000},
      {.size = 512, .refcount_bits = 3},
      {.size = 512, .version = 2, .lazy_refcounts = true},
      {.size = 512, .compression_type = "lz77"},
  };
  for (const CreateOptions& options : bad) {
    const Error error = create_failure(path, options);
    CHECK(error.text().find("create " + path + ": ") == 0);
    CHECK_MESSAGE(!fs::exists(path), error.text());
  }

  write_file(path, pattern(100));
  for (const CreateOptions& options : bad) (void)create_image(path, options);
  CHECK(read_file(path) == pattern(100));
}

TEST_CASE("create: only a regular file is replaced, and only if nobody has it locked") {
  const TempDir dir;
  fs::create_directory(dir / "folder");
  REQUIRE(mkfifo((dir / "fifo").c_str(), 0600) == 0);
  write_file(dir / "used.raw", pattern(5000));

  CHECK(create_failure(dir / "folder", raw_options(512)).text().find("not a regular file") != std::string::npos);
  CHECK(create_failure(dir / "fifo", raw_options(512)).text().find("not a regular file") != std::string::npos);
  CHECK(create_failure("/dev/null", raw_options(512)).text().find("not a regular file") != std::string::npos);
  CHECK(create_failure(dir / "no/where.raw", raw_options(512)).code() == ErrorCode::not_found);
  for (const LockRole role : {LockRole::reader, LockRole::writer}) {
    auto user = must(FileStorage::open(dir / "used.raw", {.writable = true, .lock = role}));
    CHECK(create_failure(dir / "used.raw", raw_options(512)).code() == ErrorCode::busy);
  }
  CHECK(read_file(dir / "used.raw") == pattern(5000));
}

TEST_CASE("create: an image does not replace what it stands on") {
  const TempDir dir;
  make_file(dir / "base.raw", 1_MiB);
  must(create_image(dir / "mid.qcow2", {.backing_file = "base.raw", .backing_format = "raw"}));

  for (const char* name : {"base.raw", "mid.qcow2"}) {
    const Error error = create_failure(dir / name, {.backing_file = "mid.qcow2", .backing_format = "qcow2"});
    CHECK(error.text().find("its own backing file") != std::string::npos);
  }
  CHECK(must(image_info(dir / "mid.qcow2", {})).backing_filename == "base.raw");
}

TEST_CASE("create: a file that could not be finished is removed again, one that was there stays") {
  const TempDir dir;
  const TempDir full("/dev/shm");
  if (run({"mount", "-t", "tmpfs", "-o", "size=256k", "none", full.path()}).status != 0) {
    MESSAGE("mounting is not allowed here");
    return;
  }
  make_file(full / "old", 100);
  for (const char* format : {"raw", "qcow2"}) {
    CreateOptions options{.format = format, .size = 4_MiB, .preallocation = Preallocation::full};
    CHECK(create_failure(full / "new", options).code() == ErrorCode::no_space);
    CHECK(!fs::exists(full / "new"));
    CHECK(create_failure(full / "old", options).code() == ErrorCode::no_space);
    CHECK(fs::exists(full / "old"));
  }
  CHECK(run({"umount", full.path()}).status == 0);
}

TEST_CASE("info: a raw image says what it is") {
  const TempDir dir;
  make_file(dir / "disk.raw", 10000);

  const ImageInfo info = must(image_info(dir / "disk.raw", {}));

  CHECK(info.filename == dir / "disk.raw");
  CHECK(info.format == "raw");
  CHECK(info.virtual_size == 10000);
  CHECK(info.actual_size == 0);
  CHECK(!info.backing_filename);
  CHECK(!info.qcow2);
}

TEST_CASE("info: an image names its backing file but does not open it") {
  const TempDir dir;
  make_file(dir / "base.raw", 1_MiB);
  must(create_image(dir / "top.qcow2", {.backing_file = "base.raw", .backing_format = "raw"}));
  fs::remove(dir / "base.raw");

  const ImageInfo info = must(image_info(dir / "top.qcow2", {}));

  CHECK(info.backing_filename == "base.raw");
  CHECK(info.full_backing_filename == dir / "base.raw");
  CHECK(info.backing_format == "raw");
  const auto chain = chain_info(dir / "top.qcow2", {});
  REQUIRE(!chain);
  CHECK(chain.error().text() ==
        "open " + (dir / "top.qcow2") + ": backing file " + (dir / "base.raw") + ": no such file");
}

TEST_CASE("info: a chain is told from the top down, under the path policy") {
  const TempDir dir;
  const TempDir other;
  make_file(other / "base.raw", 1_MiB);
  CreateOptions options{.backing_file = other / "base.raw", .backing_format = "raw"};
  options.allowed_directories = {other.path()};
  must(create_image(dir / "mid.qcow2", options));
  options = {.backing_file = "mid.qcow2", .backing_format = "qcow2"};
  options.allowed_directories = {other.path()};
  must(create_image(dir / "top.qcow2", options));

  const auto refused = chain_info(dir / "top.qcow2", {});
  REQUIRE(!refused);
  CHECK(refused.error().text().find("--allow-path " + other.path()) != std::string::npos);

  const auto infos = must(chain_info(dir / "top.qcow2", {.allowed_directories = {other.path()}}));
  REQUIRE(infos.size() == 3);
  CHECK(infos[0].filename == dir / "top.qcow2");
  CHECK(infos[1].filename == dir / "mid.qcow2");
  CHECK(infos[2].filename == other / "base.raw");
  CHECK(infos[2].format == "raw");
}

TEST_CASE("info: an image in use is read with --force-share only") {
  const TempDir dir;
  make_file(dir / "disk.raw", 4096);
  auto writer = must(open_disk(dir / "disk.raw", {}));

  CHECK(!image_info(dir / "disk.raw", {}));
  CHECK(image_info(dir / "disk.raw", {.read_only = true, .force_share = true}));
  must(writer->close());
}

TEST_CASE("check: a raw image has nothing to check") {
  const TempDir dir;
  make_file(dir / "disk.raw", 4096);

  const auto report = check_image(dir / "disk.raw", {}, Repair::none, [](const std::string&) {});

  REQUIRE(!report);
  CHECK(report.error().code() == ErrorCode::unsupported);
}

TEST_CASE("check: looking takes a reader's lock, repairing a writer's") {
  const TempDir dir;
  must(create_image(dir / "disk.qcow2", {.size = 1_MiB}));
  const auto ignore = [](const std::string&) {};
  auto reader = must(FileStorage::open(dir / "disk.qcow2", {.lock = LockRole::reader}));

  CHECK(must(check_image(dir / "disk.qcow2", {}, Repair::none, ignore)).clean());
  const auto repair = check_image(dir / "disk.qcow2", {}, Repair::all, ignore);
  REQUIRE(!repair);
  CHECK(repair.error().code() == ErrorCode::busy);
}

TEST_CASE("create: a data file has the disk's size, and what cannot be is refused with nothing made") {
  const TempDir dir;
  fs::create_directory(dir / "sub");
  CreateOptions options{.size = 1_MiB + 512};
  options.data_file = "data.raw";
  write_file(dir / "sub/data.raw", pattern(3_MiB));  // is emptied
  for (const bool raw : {false, true}) {
    options.data_file_raw = raw;
    must(create_image(dir / "sub/disk.qcow2", options));

    CHECK(read_file(dir / "sub/data.raw") == std::vector<std::byte>(1_MiB + 512));
    const ImageInfo info = must(image_info(dir / "sub/disk.qcow2", {}));
    CHECK(info.qcow2->data_file == "data.raw");
    CHECK(info.qcow2->data_file_raw == raw);
    CHECK(info.full_data_file == dir / "sub/data.raw");
  }

  const auto refused = [&](const std::string& name, auto change, const std::string& says) {
    CreateOptions wrong{.size = 1_MiB};
    wrong.data_file = name;
    change(wrong);
    CAPTURE(says);
    const Error error = create_failure(dir / "new.qcow2", wrong);
    CHECK(error.text().find(says) != std::string::npos);
    CHECK_FALSE(fs::exists(dir / "new.qcow2"));
    CHECK_FALSE(fs::exists(dir / "new.raw"));
  };
  const auto nothing = [](CreateOptions&) {};
  refused("new.qcow2", nothing, "it is the image itself");
  refused("none/new.raw", nothing, "no such file");
  refused("sub", nothing, "is a directory");
  refused(
      "/dev/null", [](CreateOptions& o) { o.allowed_directories = {"/"}; }, "neither a regular file");
  refused("../new.raw", nothing, "--allow-path");
  refused("", nothing, "name is empty");
  refused("json:{}", nothing, "is a protocol");
  refused(std::string(5000, 'n'), nothing, "is longer than 4095");
  refused(
      "new.raw", [](CreateOptions& o) { o.version = 2; }, "needs version 3");
  refused(
      "new.raw", [](CreateOptions& o) { o.format = "raw"; }, "no data file");
  const auto on = [](const std::string& backing) {
    return [backing](CreateOptions& o) {
      o.backing_file = backing;
      o.backing_format = "qcow2";
    };
  };
  refused("sub/data.raw", on("sub/disk.qcow2"), "it is the image's backing file, or one below that");
  refused("sub/disk.qcow2", on("sub/disk.qcow2"), "it is the image's backing file, or one below that");
  refused(
      "new.raw", [&](CreateOptions& o) { on("sub/disk.qcow2")(o), o.data_file_raw = true; }, "no backing file");
  CreateOptions unnamed{.size = 1_MiB};
  unnamed.data_file_raw = true;
  CHECK(create_failure(dir / "new.qcow2", unnamed).text().find("needs a data_file") != std::string::npos);
  CHECK(read_file(dir / "sub/data.raw").size() == 1_MiB + 512);
}

TEST_CASE("create: preallocation of a data file takes space there") {
  const TempDir dir;
  for (const Preallocation preallocation :
       {Preallocation::off, Preallocation::metadata, Preallocation::falloc, Preallocation::full}) {
    CreateOptions options{.size = 1_MiB, .preallocation = preallocation};
    options.data_file = "data.raw";
    must(create_image(dir / "disk.qcow2", options));

    struct stat data {};
    REQUIRE(::stat((dir / "data.raw").c_str(), &data) == 0);
    const bool full = preallocation == Preallocation::falloc || preallocation == Preallocation::full;
    CHECK((data.st_blocks * 512 >= 1 << 20) == full);
    auto disk = must(open_disk(dir / "disk.qcow2", {.read_only = true}));
    const auto extents = must(disk->map({GuestOffset(0), 1_MiB}));
    CHECK((extents.at(0).kind == ExtentKind::data) == (preallocation != Preallocation::off));
    must(disk->close());
    disk.reset();
    CHECK(fs::file_size(dir / "disk.qcow2") < 1_MiB);
  }
}

}  // namespace imgfuse::test
