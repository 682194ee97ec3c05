#include "open/chain.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "format/qcow2/header.h"
#include "imgfuse/create.h"
#include "support/mem_storage.h"
#include "support/must.h"
#include "support/random.h"
#include "unit/storage/host.h"

namespace imgfuse::test {
namespace {

namespace fs = std::filesystem;

void make_overlay(const std::string& path, const std::string& backing, const std::string& backing_format,
                  std::optional<uint64_t> size = {}) {
  CreateOptions options;
  options.backing_file = backing;
  options.backing_format = backing_format;
  options.size = size;
  options.allowed_directories = {"/"};
  must(create_image(path, options));
}

/// Overlays on what is not there (yet) or may not be opened are QEMU's to make.
bool make_unchecked_overlay(const std::string& path, const std::string& backing, const std::string& format) {
  if (!installed("qemu-img")) {
    MESSAGE("qemu-utils are not installed");
    return false;
  }
  REQUIRE(run({"qemu-img", "create", "-q", "-f", "qcow2", path, "1M"}).status == 0);
  const Outcome outcome = run({"qemu-img", "rebase", "-u", "-f", "qcow2", "-b", backing, "-F", format, path});
  CAPTURE(outcome.output);
  REQUIRE(outcome.status == 0);
  return true;
}

/// Turns the header extension that records the backing file's format into one that nobody knows.
void forget_backing_format(const std::string& path) {
  auto content = read_file(path);
  const std::string_view text(reinterpret_cast<const char*>(content.data()), content.size());
  const size_t at = text.find("\xE2\x79\x2A\xCA");
  REQUIRE(at != std::string_view::npos);
  content[at] = std::byte{0x12};
  write_file(path, content);
}

std::string failure(const std::string& path, OpenOptions options = {.read_only = true}) {
  auto disk = open_disk(path, options);
  if (disk) (void)(*disk)->close();
  REQUIRE(!disk);
  return disk.error().text();
}

void finish(std::unique_ptr<Disk> disk) { must(disk->close()); }

std::vector<std::byte> read_disk(Disk& disk, uint64_t offset, size_t length) {
  std::vector<std::byte> out(length);
  must(disk.read(GuestOffset(offset), out));
  return out;
}

size_t open_files() {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator("/proc/self/fd")) ++count;
  return count;
}

}  // namespace

TEST_CASE("open: a raw disk is read and written") {
  const TempDir dir;
  write_file(dir / "disk.raw", pattern(100001));
  auto disk = must(open_disk(dir / "disk.raw", {}));

  CHECK(disk->size() == 100001);
  must(disk->write(GuestOffset(50000), pattern(1000, 7)));
  must(disk->close());

  auto expected = pattern(100001);
  const auto change = pattern(1000, 7);
  std::copy(change.begin(), change.end(), expected.begin() + 50000);
  CHECK(read_file(dir / "disk.raw") == expected);
}

TEST_CASE("open: each failure is one clear line") {
  const TempDir dir;
  fs::create_directory(dir / "folder");
  REQUIRE(mkfifo((dir / "fifo").c_str(), 0600) == 0);
  make_file(dir / "disk.raw", 512);

  CHECK(failure(dir / "none.raw") == "open " + (dir / "none.raw") + ": no such file");
  CHECK(failure(dir / "no/dir.raw") == "open " + (dir / "no/dir.raw") + ": no such file");
  CHECK(failure(dir / "folder") == "open " + (dir / "folder") + ": is a directory, not an image");
  CHECK(failure(dir / "fifo") == "open " + (dir / "fifo") + ": is neither a regular file nor a block device");
  CHECK(failure(dir / "disk.raw", {.format = "vmdk"}) ==
        "open " + (dir / "disk.raw") + ": format vmdk is not implemented; raw, qcow2, qed and fvd are");
  CHECK(failure(dir / "disk.raw", {.read_only = true, .format = "qcow2"}).find("open " + (dir / "disk.raw")) == 0);
  CHECK(failure(dir / "disk.raw", {.force_share = true}).find("add --read-only") != std::string::npos);
  CHECK(failure(dir / "disk.raw", {.read_only = true, .allowed_directories = {dir / "none"}}).find("--allow-path") !=
        std::string::npos);
}

TEST_CASE("open: another format's file is opened as raw only when told so") {
  const TempDir dir;
  write_file(dir / "disk.vmdk", std::as_bytes(std::span("KDMV")));

  CHECK(failure(dir / "disk.vmdk").find("--format raw") != std::string::npos);
  auto disk = must(open_disk(dir / "disk.vmdk", {.read_only = true, .format = "raw"}));
  CHECK(disk->size() == 5);
}

TEST_CASE("open: a probed raw disk guards its first sector, a given one does not") {
  const TempDir dir;
  make_file(dir / "disk.raw", 4096);
  const ConstBytes magic = std::as_bytes(std::span("QFI\xfb\0\0\0\3", 8));

  for (const bool given : {false, true}) {
    OpenOptions options;
    if (given) options.format = "raw";
    auto disk = must(open_disk(dir / "disk.raw", options));
    CHECK(disk->write(GuestOffset(0), magic).has_value() == given);
    must(disk->close());
  }
}

TEST_CASE("open: the image is locked until its disk is closed") {
  const TempDir dir;
  make_file(dir / "disk.raw", 4096);
  auto writer = must(open_disk(dir / "disk.raw", {}));

  CHECK(failure(dir / "disk.raw", {}).find("Failed to get \"write\" lock") != std::string::npos);
  CHECK(failure(dir / "disk.raw").find("add --force-share") != std::string::npos);
  CHECK(open_disk(dir / "disk.raw", {.read_only = true, .force_share = true}));
  must(writer->close());
  CHECK(open_disk(dir / "disk.raw", {.read_only = true}));
}

TEST_CASE("open: with cache=writethrough a write is flushed when it returns") {
  const TempDir dir;
  make_file(dir / "disk.raw", 8192);
  for (const CacheMode cache : {CacheMode::writethrough, CacheMode::directsync, CacheMode::none, CacheMode::unsafe}) {
    auto disk = must(open_disk(dir / "disk.raw", {.cache = cache}));
    must(disk->write(GuestOffset(10), pattern(100)));
    must(disk->flush());
    CHECK(read_disk(*disk, 10, 100) == pattern(100));
    must(disk->close());
  }
}

TEST_CASE("chain: an overlay reads through to its backing files, in any mix of formats and sizes") {
  const TempDir dir;
  write_file(dir / "base.raw", pattern(1000448));  // shorter than what stands on it
  make_overlay(dir / "mid.qcow2", "base.raw", "raw", 2_MiB);
  make_overlay(dir / "top.qcow2", "mid.qcow2", "qcow2", 4_MiB);
  {
    auto mid = must(open_disk(dir / "mid.qcow2", {}));
    must(mid->write(GuestOffset(500000), pattern(1000, 2)));
    finish(std::move(mid));
  }

  auto top = must(open_disk(dir / "top.qcow2", {}));
  must(top->write(GuestOffset(3000000), pattern(1000, 3)));

  auto expected = pattern(1000448);
  expected.resize(4_MiB);
  const auto middle = pattern(1000, 2);
  const auto own = pattern(1000, 3);
  std::copy(middle.begin(), middle.end(), expected.begin() + 500000);
  std::copy(own.begin(), own.end(), expected.begin() + 3000000);
  CHECK(read_disk(*top, 0, 4_MiB) == expected);
  finish(std::move(top));
  auto again = must(open_disk(dir / "top.qcow2", {.read_only = true}));
  CHECK(read_disk(*again, 0, 4_MiB) == expected);
  CHECK(read_file(dir / "base.raw") == pattern(1000448));
}

TEST_CASE("chain: relative names start at the directory of the image that names them") {
  const TempDir dir;
  fs::create_directories(dir / "tops/mids/bases");
  write_file(dir / "tops/mids/bases/base.raw", pattern(65536));
  make_overlay(dir / "tops/mids/mid.qcow2", "bases/base.raw", "raw");
  make_overlay(dir / "tops/top.qcow2", "mids/mid.qcow2", "qcow2");

  auto top = must(open_disk(dir / "tops/top.qcow2", {.read_only = true}));

  CHECK(read_disk(*top, 0, 65536) == pattern(65536));
}

TEST_CASE("chain: backing files are locked as readers") {
  const TempDir dir;
  make_file(dir / "base.raw", 1_MiB);
  make_overlay(dir / "top.qcow2", "base.raw", "raw");
  make_overlay(dir / "other.qcow2", "base.raw", "raw");
  auto top = must(open_disk(dir / "top.qcow2", {}));

  CHECK(failure(dir / "base.raw", {}).find("Failed to get \"write\" lock") != std::string::npos);
  auto other = must(open_disk(dir / "other.qcow2", {}));  // two overlays share a base
  finish(std::move(other));
  finish(std::move(top));
  auto writer = must(open_disk(dir / "base.raw", {}));
  const std::string text = failure(dir / "top.qcow2");
  CHECK(text.find("backing file " + (dir / "base.raw") + ": Failed to get shared \"write\" lock") != std::string::npos);
  CHECK(open_disk(dir / "top.qcow2", {.read_only = true, .force_share = true}));
  must(writer->close());
}

TEST_CASE("chain: it ends above a file that is named as its end, and that file is not locked") {
  const TempDir dir;
  write_file(dir / "base.raw", pattern(1_MiB, 1));
  make_overlay(dir / "middle.qcow2", "base.raw", "raw");
  make_overlay(dir / "top.qcow2", "middle.qcow2", "qcow2");

  for (const std::string end : {"base.raw", "middle.qcow2"}) {
    auto disk = must(open_disk(dir / "top.qcow2", {.chain_end = dir / end}));
    CHECK(read_disk(*disk, 0, 4096) == std::vector<std::byte>(4096));
    must(must(open_disk(dir / end, {.format = end == "base.raw" ? "raw" : "qcow2"}))->close());
    finish(std::move(disk));
  }

  CHECK(failure(dir / "middle.qcow2", {.chain_end = dir / "top.qcow2"}).find("not in its backing chain") !=
        std::string::npos);
  CHECK(failure(dir / "middle.qcow2", {.chain_end = dir / "nothing"}).find("nothing") != std::string::npos);
}

TEST_CASE("chain: a missing backing file is named, and only it") {
  const TempDir dir;
  if (!make_unchecked_overlay(dir / "mid.qcow2", "base.raw", "raw")) return;
  make_unchecked_overlay(dir / "top.qcow2", "mid.qcow2", "qcow2");

  CHECK(failure(dir / "top.qcow2") ==
        "open " + (dir / "top.qcow2") + ": backing file " + (dir / "base.raw") + ": no such file");
}

TEST_CASE("chain: files outside the image's directory need --allow-path") {
  const TempDir dir;
  const TempDir other;
  write_file(other / "base.raw", pattern(65536));
  make_overlay(dir / "top.qcow2", other / "base.raw", "raw");
  fs::create_symlink(other / "base.raw", dir / "link.raw");
  make_overlay(dir / "linked.qcow2", "link.raw", "raw");

  CHECK(failure(dir / "top.qcow2").find("add --allow-path " + other.path()) != std::string::npos);
  CHECK(failure(dir / "linked.qcow2").find("add --allow-path " + other.path()) != std::string::npos);
  for (const char* name : {"top.qcow2", "linked.qcow2"}) {
    auto disk = must(open_disk(dir / name, {.read_only = true, .allowed_directories = {other.path()}}));
    CHECK(read_disk(*disk, 0, 65536) == pattern(65536));
  }
}

TEST_CASE("chain: protocols and devices that an image names are refused") {
  const TempDir dir;
  if (!make_unchecked_overlay(dir / "nbd.qcow2", "nbd:localhost:10809", "raw")) return;
  make_unchecked_overlay(dir / "device.qcow2", "/dev/zero", "raw");

  CHECK(failure(dir / "nbd.qcow2").find("backing file nbd:localhost:10809: nbd: is a protocol") != std::string::npos);
  CHECK(failure(dir / "device.qcow2").find("add --allow-path /dev") != std::string::npos);
  CHECK(failure(dir / "device.qcow2", {.read_only = true, .allowed_directories = {"/dev"}})
            .find("is neither a regular file nor a block device") != std::string::npos);
}

TEST_CASE("chain: a backing file without a recorded format is never probed") {
  const TempDir dir;
  write_file(dir / "base.raw", pattern(1 << 20));
  make_overlay(dir / "top.qcow2", "base.raw", "raw");
  forget_backing_format(dir / "top.qcow2");

  CHECK(failure(dir / "top.qcow2").find("--backing-format") != std::string::npos);
  auto disk = must(open_disk(dir / "top.qcow2", {.read_only = true, .backing_format = "raw"}));
  CHECK(read_disk(*disk, 0, 1 << 20) == pattern(1 << 20));
  CHECK(failure(dir / "top.qcow2", {.read_only = true, .backing_format = "vmdk"})
            .find("format vmdk is not implemented") != std::string::npos);
}

TEST_CASE("chain: what a QED image says is not raw is probed, and refused if it looks raw") {
  const TempDir dir;
  must(create_image(dir / "base", {.size = 1_MiB}));
  must(create_image(dir / "top.qed",
                    {.format = "qed", .size = 1_MiB, .backing_file = "base", .backing_format = "qcow2"}));
  finish(must(open_disk(dir / "top.qed", {})));
  CHECK(must(chain_info(dir / "top.qed", {})).at(1).format == "qcow2");

  write_file(dir / "base", pattern(1_MiB));

  CHECK(failure(dir / "top.qed").find("it looks like a raw disk") != std::string::npos);
  finish(must(open_disk(dir / "top.qed", {.backing_format = "raw"})));
}

TEST_CASE("chain: a raw backing file stays raw, whatever the guest wrote into it") {
  for (const char* format : {"qcow2", "qed"}) {
    const TempDir dir;
    make_file(dir / "base.raw", 1_MiB);
    must(create_image(dir / "top",
                      {.format = format, .size = 1_MiB, .backing_file = "base.raw", .backing_format = "raw"}));
    must(create_image(dir / "inner.qcow2", {.size = 1_MiB}));
    auto content = read_file(dir / "inner.qcow2");
    content.resize(1_MiB);
    write_file(dir / "base.raw", content);

    auto disk = must(open_disk(dir / "top", {.read_only = true}));

    CHECK(read_disk(*disk, 0, 1_MiB) == content);
  }
}

TEST_CASE("chain: images that name each other in a circle are refused, also through links") {
  const TempDir dir;
  if (!make_unchecked_overlay(dir / "a.qcow2", "b.qcow2", "qcow2")) return;
  make_unchecked_overlay(dir / "b.qcow2", "a.qcow2", "qcow2");
  make_unchecked_overlay(dir / "self.qcow2", "link.qcow2", "qcow2");
  fs::create_hard_link(dir / "self.qcow2", dir / "link.qcow2");

  for (const char* name : {"a.qcow2", "b.qcow2", "self.qcow2"})
    CHECK(failure(dir / name).find("in a circle") != std::string::npos);
  CHECK(failure(dir / "a.qcow2", {}).find("in a circle") != std::string::npos);
}

TEST_CASE("chain: two hundred backing files are opened, more are refused, and none stays open") {
  const TempDir dir;
  write_file(dir / "0", pattern(65536));
  make_overlay(dir / "1", "0", "raw");
  for (unsigned i = 2; i <= kMaxChainDepth; ++i) make_overlay(dir / std::to_string(i), std::to_string(i - 1), "qcow2");
  const size_t before = open_files();

  auto disk = must(open_disk(dir / std::to_string(kMaxChainDepth), {}));
  CHECK(open_files() <= before + kMaxChainDepth + 1);
  CHECK(read_disk(*disk, 0, 65536) == pattern(65536));
  finish(std::move(disk));

  if (make_unchecked_overlay(dir / "long", std::to_string(kMaxChainDepth), "qcow2"))
    CHECK(failure(dir / "long") ==
          "open " + (dir / "long") + ": backing file " + (dir / "0") + ": the chain has more than 200 backing files");
  CHECK(open_files() == before);
}

TEST_CASE("chain: running out of descriptors in the middle leaves nothing open") {
  const TempDir dir;
  write_file(dir / "0", pattern(65536));
  make_overlay(dir / "1", "0", "raw");
  for (int i = 2; i <= 30; ++i) make_overlay(dir / std::to_string(i), std::to_string(i - 1), "qcow2");
  const size_t before = open_files();
  struct rlimit old {};
  REQUIRE(getrlimit(RLIMIT_NOFILE, &old) == 0);
  const struct rlimit few { before + 20, old.rlim_max };
  REQUIRE(setrlimit(RLIMIT_NOFILE, &few) == 0);

  auto disk = open_disk(dir / "30", {.read_only = true});

  REQUIRE(setrlimit(RLIMIT_NOFILE, &old) == 0);
  CHECK(!disk);
  CHECK(open_files() == before);
}

namespace {

/// An image with an external data file, of 1 MiB.
void make_with_data_file(const std::string& path, const std::string& data_file,
                         const std::optional<std::string>& backing = {}) {
  CreateOptions options{.size = 1_MiB, .backing_file = backing, .allowed_directories = {"/"}};
  if (backing) options.backing_format = "qcow2";
  options.data_file = data_file;
  must(create_image(path, options));
}

}  // namespace

TEST_CASE("open: a data file is found from the image's directory, by relative and absolute names and through links") {
  const TempDir dir;
  fs::create_directory(dir / "sub");
  make_with_data_file(dir / "sub/relative.qcow2", "relative.raw");
  make_with_data_file(dir / "sub/absolute.qcow2", dir / "sub/absolute.raw");
  make_with_data_file(dir / "sub/link.qcow2", "real.raw");
  fs::rename(dir / "sub/real.raw", dir / "sub/moved.raw");
  fs::create_symlink("moved.raw", dir / "sub/real.raw");

  const std::pair<const char*, const char*> files[] = {{"sub/relative.qcow2", "sub/relative.raw"},
                                                       {"sub/absolute.qcow2", "sub/absolute.raw"},
                                                       {"sub/link.qcow2", "sub/moved.raw"}};
  for (const auto& file : files) {
    CAPTURE(file.first);
    auto disk = must(open_disk(dir / file.first, {}));
    must(disk->write(GuestOffset(4096), pattern(4096, 1)));
    finish(std::move(disk));
    const auto content = read_file(dir / file.second);
    CHECK(content.size() == 1_MiB);
    CHECK(std::vector(content.begin() + 4096, content.begin() + 8192) == pattern(4096, 1));
  }
}

TEST_CASE("open: a data file elsewhere is opened only where that is allowed, or where the user names it") {
  const TempDir dir;
  fs::create_directory(dir / "images");
  fs::create_directory(dir / "elsewhere");
  const std::string image = dir / "images/disk.qcow2";
  make_with_data_file(image, "../elsewhere/data.raw");
  make_with_data_file(dir / "images/link.qcow2", "link.raw");
  fs::remove(dir / "images/link.raw");
  fs::create_symlink("../elsewhere/data.raw", dir / "images/link.raw");

  for (const std::string& path : {image, dir / "images/link.qcow2"}) {
    const std::string text = failure(path, {});
    CHECK(text.find("outside the image's directory; to allow it, add --allow-path " + dir / "elsewhere") !=
          std::string::npos);
    finish(must(open_disk(path, {.allowed_directories = {dir / "elsewhere"}})));
    OpenOptions given;
    given.data_file = dir / "elsewhere/data.raw";
    finish(must(open_disk(path, given)));
  }
}

TEST_CASE("open: a data file that is missing, no file, or part of the chain is refused in one line") {
  const TempDir dir;
  make_with_data_file(dir / "base.qcow2", "base.raw");
  make_with_data_file(dir / "top.qcow2", "top.raw", "base.qcow2");
  const std::string top = dir / "top.qcow2";
  const auto replace = [&](const std::string& target) {
    fs::remove(dir / "top.raw");
    fs::create_symlink(target, dir / "top.raw");
  };
  const std::string begin = "open " + top + ": data file " + (dir / "top.raw") + ": ";

  for (const bool read_only : {false, true}) {
    const OpenOptions options{.read_only = read_only};
    replace("top.qcow2");
    CHECK(failure(top, options) ==
          begin + "it is the image itself, or another image of its chain, or the data file of one");
    replace("base.qcow2");
    CHECK(failure(top, options).find("in the chain already") != std::string::npos);
    replace("base.raw");
    CHECK(failure(top, options) ==
          "open " + top + ": data file " + (dir / "base.raw") +
              ": it is the image itself, or another image of its chain, or the data file of one");
    replace("nothing.raw");
    CHECK(failure(top, options) == begin + "no such file");
    replace(".");
    CHECK(failure(top, options) == begin + "is a directory, not an image");
  }
  fs::remove(dir / "top.raw");
  CHECK(failure(top) == begin + "no such file");
}

TEST_CASE("open: a data file's name that is none, or no path, is refused in one line") {
  const TempDir dir;
  const std::string image = dir / "disk.qcow2";
  make_with_data_file(image, "data.raw");
  const std::pair<std::string, const char*> names[] = {{"", "its name is empty"},
                                                       {std::string("data\0.raw", 9), "/data: no such file"},
                                                       {"nbd:host", "nbd: is a protocol"},
                                                       {"json:{\"driver\":\"file\"}", "json: is a protocol"},
                                                       {"line\nline", "line?line: no such file"},
                                                       {"data.raw/", "data.raw/: "},
                                                       {std::string(4095, 'n'), "ame too long"}};
  for (const auto& [name, says] : names) {
    MemStorage storage(MemImage::load(image));
    qcow2::Header header = must(qcow2::read_header(storage, qcow2::Purpose::write));
    header.data_file = name;
    must(storage.write(HostOffset(0), must(qcow2::encode_header(header))));
    storage.image().save(image);

    const std::string text = failure(image, {});
    CAPTURE(text);
    CHECK(text.find(says) != std::string::npos);
    CHECK(text.find('\n') == std::string::npos);
  }
  CHECK(read_file(dir / "data.raw") == std::vector<std::byte>(1_MiB));
}

TEST_CASE("open: two images cannot write to one data file, and a raw disk not beside one") {
  const TempDir dir;
  make_with_data_file(dir / "a.qcow2", "a.raw");
  make_with_data_file(dir / "b.qcow2", "b.raw");
  fs::remove(dir / "b.raw");
  fs::create_symlink("a.raw", dir / "b.raw");

  auto disk = must(open_disk(dir / "a.qcow2", {}));
  CHECK(failure(dir / "b.qcow2", {}).find("Failed to get") != std::string::npos);
  CHECK(failure(dir / "b.qcow2").find("--force-share") != std::string::npos);
  CHECK(failure(dir / "a.raw", {}).find("Failed to get") != std::string::npos);
  finish(must(open_disk(dir / "b.qcow2", {.read_only = true, .force_share = true})));
  finish(std::move(disk));
  auto reader = must(open_disk(dir / "a.qcow2", {.read_only = true}));
  finish(must(open_disk(dir / "b.qcow2", {.read_only = true})));
  finish(std::move(reader));
}

}  // namespace imgfuse::test
