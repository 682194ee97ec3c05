#include "storage/image_lock.h"

#include <sys/wait.h>
#include <unistd.h>

#include "storage/file_storage.h"
#include "support/must.h"
#include "unit/storage/host.h"

namespace imgfuse::test {
namespace {

Result<std::shared_ptr<FileStorage>> open_as(LockRole role, const std::string& path) {
  return FileStorage::open(path, {.writable = role == LockRole::writer || role == LockRole::data_writer, .lock = role});
}

bool refused(LockRole role, const std::string& path) {
  auto storage = open_as(role, path);
  if (!storage) CHECK(storage.error().code() == ErrorCode::busy);
  return !storage;
}

bool have_qemu() {
  static const bool have = installed("qemu-io") && installed("qemu-img");
  if (!have) MESSAGE("qemu-utils are not installed");
  return have;
}

void make_qcow2_file(const std::string& path) {
  REQUIRE(run({"qemu-img", "create", "-q", "-f", "qcow2", path, "1M"}).status == 0);
}

}  // namespace

TEST_CASE("image lock: readers suffer each other, a writer is alone") {
  const TempDir dir;
  const std::string path = dir / "image";
  make_file(path, 4096);

  {
    auto reader = must(open_as(LockRole::reader, path));
    CHECK(!refused(LockRole::reader, path));
    CHECK(refused(LockRole::writer, path));
  }
  {
    auto writer = must(open_as(LockRole::writer, path));
    CHECK(refused(LockRole::reader, path));
    CHECK(refused(LockRole::writer, path));
    CHECK(!refused(LockRole::none, path));
  }
  CHECK(!refused(LockRole::writer, path));
}

TEST_CASE("image lock: a data file is read by many images and written by one") {
  const TempDir dir;
  const std::string path = dir / "data";
  make_file(path, 4096);

  {
    auto reader = must(open_as(LockRole::data_reader, path));
    CHECK(!refused(LockRole::data_reader, path));
    CHECK(!refused(LockRole::reader, path));
    CHECK(refused(LockRole::data_writer, path));
    CHECK(refused(LockRole::writer, path));
  }
  auto writer = must(open_as(LockRole::data_writer, path));
  CHECK(refused(LockRole::data_reader, path));
  CHECK(refused(LockRole::data_writer, path));
  CHECK(refused(LockRole::reader, path));
  CHECK(refused(LockRole::writer, path));
}

TEST_CASE("image lock: QEMU and imgfuse keep each other from a data file") {
  if (!have_qemu()) return;
  const TempDir dir;
  const std::string image = dir / "image.qcow2";
  const std::string data = dir / "data";
  REQUIRE(run({"qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=" + data, image, "1M"}).status == 0);
  const auto opens = [&](const std::vector<std::string>& options) {
    std::vector<std::string> command = {"qemu-io", "-c", "read 0 512"};
    command.insert(command.end(), options.begin(), options.end());
    command.push_back(image);
    return run(command).status == 0;
  };
  {
    auto reader = must(open_as(LockRole::data_reader, data));
    CHECK(opens({"-r"}));
    CHECK_FALSE(opens({}));
  }
  {
    auto writer = must(open_as(LockRole::data_writer, data));
    CHECK_FALSE(opens({"-r"}));
    CHECK_FALSE(opens({}));
  }
  const QemuIo qemu({"-f", "qcow2"}, image);
  CHECK(refused(LockRole::data_reader, data));
  CHECK(refused(LockRole::data_writer, data));
}

TEST_CASE("image lock: a refusal uses QEMU's words and names this process") {
  const TempDir dir;
  const std::string path = dir / "image";
  make_file(path, 4096);
  auto writer = must(open_as(LockRole::writer, path));

  const std::string holder = fmt::format("{} is in use by this process (pid {})", path, getpid());
  const auto second = open_as(LockRole::writer, path);
  REQUIRE(!second);
  CHECK(second.error().text().find("Failed to get \"write\" lock: " + holder) == 0);
  CHECK(second.error().text().find("--force-share") == std::string::npos);
  const auto reader = open_as(LockRole::reader, path);
  REQUIRE(!reader);
  CHECK(reader.error().text().find("Failed to get shared \"write\" lock: " + holder) == 0);
  CHECK(reader.error().text().find("--force-share") != std::string::npos);
}

TEST_CASE("image lock: other names of a file lead to the same lock") {
  const TempDir dir;
  make_file(dir / "image", 4096);
  std::filesystem::create_hard_link(dir / "image", dir / "hard");
  std::filesystem::create_symlink("image", dir / "soft");
  auto writer = must(open_as(LockRole::writer, dir / "image"));

  CHECK(refused(LockRole::reader, dir / "hard"));
  CHECK(refused(LockRole::writer, dir / "soft"));
}

TEST_CASE("image lock: it survives the end of the process that took it, in a child") {
  const TempDir dir;
  const std::string path = dir / "image";
  make_file(path, 4096);
  int hold[2];
  REQUIRE(pipe(hold) == 0);

  auto writer = must(open_as(LockRole::writer, path));
  const pid_t child = fork();
  if (child == 0) {
    close(hold[1]);
    char c;
    _exit(read(hold[0], &c, 1) == 0 ? 0 : 1);
  }
  writer.reset();

  CHECK(refused(LockRole::writer, path));
  close(hold[1]);
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  CHECK(!refused(LockRole::writer, path));
  close(hold[0]);
}

TEST_CASE("image lock: a QEMU that writes keeps us out, and is named") {
  if (!have_qemu()) return;
  const TempDir dir;
  const std::string path = dir / "vm.qcow2";
  make_qcow2_file(path);
  const QemuIo qemu({"-f", "qcow2"}, path);

  for (const LockRole role : {LockRole::writer, LockRole::reader}) {
    const auto storage = open_as(role, path);
    REQUIRE(!storage);
    CHECK(storage.error().code() == ErrorCode::busy);
    CAPTURE(storage.error().text());
    CHECK(storage.error().text().find(fmt::format("{} is in use by qemu-io (pid {})", path, qemu.pid())) !=
          std::string::npos);
  }
  CHECK(!refused(LockRole::none, path));
}

TEST_CASE("image lock: a QEMU that reads suffers our readers only") {
  if (!have_qemu()) return;
  const TempDir dir;
  const std::string path = dir / "vm.qcow2";
  make_qcow2_file(path);
  const QemuIo qemu({"-r", "-f", "qcow2"}, path);

  CHECK(!refused(LockRole::reader, path));
  CHECK(refused(LockRole::writer, path));
}

TEST_CASE("image lock: our writer keeps QEMU out, our reader lets it read") {
  if (!have_qemu()) return;
  const TempDir dir;
  const std::string path = dir / "vm.qcow2";
  make_qcow2_file(path);
  const std::vector<std::string> info{"qemu-img", "info", "-f", "qcow2", path};
  const std::vector<std::string> write{"qemu-io", "-f", "qcow2", "-c", "write 0 4k", path};

  {
    auto writer = must(open_as(LockRole::writer, path));
    CHECK(run(info).status == 1);
    CHECK(run(info).output.find("Failed to get shared \"write\" lock") != std::string::npos);
    CHECK(run(write).output.find("lock") != std::string::npos);
    CHECK(run({"qemu-img", "info", "-U", "-f", "qcow2", path}).status == 0);
  }
  {
    auto reader = must(open_as(LockRole::reader, path));
    CHECK(run(info).status == 0);
    CHECK(run(write).output.find("Failed to get \"write\" lock") != std::string::npos);
  }
  {
    auto bystander = must(open_as(LockRole::none, path));
    CHECK(run(write).status == 0);
  }
}

TEST_CASE("image lock: the bytes are those that QEMU's writer locks") {
  const TempDir dir;
  const std::string path = dir / "image";
  make_file(path, 4096);
  auto writer = must(open_as(LockRole::writer, path));

  const auto text = read_file(fmt::format("/proc/self/fdinfo/{}", writer->fd()));
  const std::string info(reinterpret_cast<const char*>(text.data()), text.size());
  CAPTURE(info);
  CHECK(info.find(" 100 101\n") != std::string::npos);
  CHECK(info.find(" 103 103\n") != std::string::npos);
  CHECK(info.find(" 201 201\n") != std::string::npos);
  CHECK(info.find(" 203 203\n") != std::string::npos);
}

}  // namespace imgfuse::test
