// Changes to the disk of a real mount, through its control socket.
#include <doctest/doctest.h>
#include <sys/mman.h>

#include <cerrno>
#include <filesystem>
#include <set>

#include "control/client.h"
#include "memory_snapshots.h"
#include "mounted.h"

namespace imgfuse::fuse {
namespace {

using control::Json;

constexpr uint64_t kSize = 1_MiB;
constexpr MountpointKind kBoth[] = {MountpointKind::file, MountpointKind::directory};

Json ask(const Mounted& mounted, const std::string& command, const Json& arguments = Json::object()) {
  const auto entry = find_mount(mounted.point());
  REQUIRE(entry);
  auto daemons = control::Client::connect(entry->device, entry->user);
  REQUIRE(daemons.size() == 1);
  const auto answer = daemons[0].call(command, arguments);
  return answer ? *answer : Json{{"error", answer.error().text()}};
}

void write_at(const Open& file, off_t offset, const std::string& text) {
  REQUIRE(::pwrite(file.fd(), text.data(), text.size(), offset) == static_cast<ssize_t>(text.size()));
}

std::set<std::string> names_in(const std::string& folder) {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) names.insert(entry.path().filename());
  return names;
}

TEST_CASE("fuse live: info names image and mount point") {
  MemoryDisk disk(kSize);
  const Mounted mounted(disk, MountpointKind::file);

  const Json info = ask(mounted, "info");

  CHECK(info.at("image") == "/image");
  CHECK(info.at("mountpoint") == mounted.point());
  CHECK(info.at("virtual-size") == kSize);
  CHECK(ask(mounted, "hello").at("pid") == ::getpid());
}

TEST_CASE("fuse live: readers see the size and the content of a snapshot that is applied, cached or not") {
  for (const bool writeback : {false, true}) {
    for (const MountpointKind kind : kBoth) {
      CAPTURE(writeback);
      CAPTURE(static_cast<int>(kind));
      SnapshotMemoryDisk disk(kSize);
      MountOptions options;
      options.writeback_cache = writeback;
      const Mounted mounted(disk, kind, options);
      const Open file(mounted.file());
      write_at(file, 0, "then");
      write_at(file, kSize - 4, "end.");
      REQUIRE(!ask(mounted, "snapshot-create", {{"name", "a"}}).contains("error"));
      write_at(file, 0, "later");
      CHECK(ask(mounted, "resize", {{"size", 2 * kSize}}).at("virtual-size") == 2 * kSize);
      CHECK(file.attributes().st_size == 2 * kSize);
      CHECK(std::filesystem::file_size(mounted.file()) == 2 * kSize);
      write_at(file, 2 * kSize - 4, "new.");
      const void* const memory = ::mmap(nullptr, kSize, PROT_READ, MAP_SHARED, file.fd(), 0);
      REQUIRE(memory != MAP_FAILED);
      const auto mapped = [&] { return std::string(static_cast<const char*>(memory), 5); };
      CHECK(mapped() == "later");

      CHECK(ask(mounted, "snapshot-apply", {{"snapshot", "a"}}) == Json::object());

      CHECK(mapped() == std::string("then\0", 5));
      CHECK(read_at(file, 0, 5) == std::string("then\0", 5));
      CHECK(read_at(file, kSize - 4, 10) == "end.");
      CHECK(file.attributes().st_size == kSize);
      ::munmap(const_cast<void*>(memory), kSize);
    }
  }
}

TEST_CASE("fuse live: what a mapping or a write-back cache holds is in the snapshot") {
  for (const bool writeback : {false, true}) {
    SnapshotMemoryDisk disk(kSize);
    MountOptions options;
    options.writeback_cache = writeback;
    const Mounted mounted(disk, MountpointKind::directory, options);
    const Open file(mounted.file());
    write_at(file, 0, "written");
    void* const memory = ::mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_SHARED, file.fd(), 0);
    REQUIRE(memory != MAP_FAILED);
    std::memcpy(static_cast<char*>(memory) + 8192, "mapped", 6);

    REQUIRE(!ask(mounted, "snapshot-create", {{"name", "a"}}).contains("error"));

    const Open snapshot(mounted.point() + "/snapshots/a.raw", O_RDONLY);
    CHECK(read_at(snapshot, 0, 7) == "written");
    CHECK(read_at(snapshot, 8192, 6) == "mapped");
    ::munmap(memory, kSize);
  }
}

TEST_CASE("fuse live: a shrunk disk ends where it ends, in the cache too") {
  MemoryDisk disk(kSize);
  const Mounted mounted(disk, MountpointKind::file);
  const Open file(mounted.file());
  write_at(file, 0, std::string(kSize, 'x'));

  CHECK(ask(mounted, "resize", {{"size", kSize / 2}}).contains("error"));
  CHECK(!ask(mounted, "resize", {{"size", kSize / 2}, {"shrink", true}}).contains("error"));

  CHECK(file.attributes().st_size == kSize / 2);
  CHECK(read_at(file, kSize / 2 - 1, 10) == "x");
  CHECK(::pwrite(file.fd(), "y", 1, kSize / 2) == -1);
  CHECK(errno == ENOSPC);
}

TEST_CASE("fuse live: a directory shows snapshots as they come and go") {
  SnapshotMemoryDisk disk(kSize);
  const Mounted mounted(disk, MountpointKind::directory);
  const std::string folder = mounted.point() + "/snapshots";
  CHECK(names_in(mounted.point()) == std::set<std::string>{"disk.raw", "info.json", "snapshots", "stats.json"});
  CHECK(names_in(folder).empty());
  CHECK(::access((folder + "/a.raw").c_str(), F_OK) == -1);

  ask(mounted, "snapshot-create", {{"name", "a"}});
  ask(mounted, "snapshot-create", {{"name", "b"}});

  CHECK(names_in(folder) == std::set<std::string>{"a.raw", "b.raw"});
  struct stat attributes;
  REQUIRE(::stat((folder + "/a.raw").c_str(), &attributes) == 0);
  CHECK(attributes.st_size == kSize);
  CHECK(attributes.st_mode == (S_IFREG | 0400));
  CHECK(attributes.st_mtim.tv_sec == 1'700'000'000);
  CHECK(::open((folder + "/a.raw").c_str(), O_RDWR) == -1);
  CHECK(errno == EROFS);
  CHECK(::unlink((folder + "/a.raw").c_str()) == -1);
  ask(mounted, "snapshot-delete", {{"snapshot", "a"}});
  CHECK(::access((folder + "/a.raw").c_str(), F_OK) == -1);
  CHECK(names_in(folder) == std::set<std::string>{"b.raw"});
}

TEST_CASE("fuse live: a snapshot's file keeps its content, and its snapshot while it is open") {
  SnapshotMemoryDisk disk(kSize);
  const Mounted mounted(disk, MountpointKind::directory);
  const Open file(mounted.file());
  write_at(file, 0, "then");
  ask(mounted, "snapshot-create", {{"name", "a"}});
  write_at(file, 0, "later");
  {
    const Open snapshot(mounted.point() + "/snapshots/a.raw", O_RDONLY);
    CHECK(read_at(snapshot, 0, 5) == std::string("then\0", 5));
    CHECK(::lseek(snapshot.fd(), 0, SEEK_HOLE) >= 0);
    CHECK(disk.open_count() == 1);
    CHECK(ask(mounted, "snapshot-delete", {{"snapshot", "a"}}).contains("error"));
    CHECK(disk.open_count() == 1);
  }
  CHECK(ask(mounted, "snapshot-delete", {{"snapshot", "a"}}) == Json::object());
  CHECK(disk.open_count() == 0);
}

TEST_CASE("fuse live: the end of the session closes open snapshots before the disk") {
  SnapshotMemoryDisk disk(kSize);
  Mounted mounted(disk, MountpointKind::directory);
  ask(mounted, "snapshot-create", {{"name", "a"}});
  const Open snapshot(mounted.point() + "/snapshots/a.raw", O_RDONLY);
  REQUIRE(disk.open_count() == 1);

  CHECK(mounted.stop());

  CHECK(disk.open_count() == 0);
  CHECK(disk.closed());
}

TEST_CASE("fuse live: large folders are listed whole") {
  SnapshotMemoryDisk disk(4096);
  for (unsigned i = 0; i < 2000; ++i) disk.add({.id = std::to_string(i), .name = "snapshot " + std::to_string(i)});
  const Mounted mounted(disk, MountpointKind::directory);

  CHECK(names_in(mounted.point() + "/snapshots").size() == 2000);
}

TEST_CASE("fuse live: a session that is stopped while a command runs ends") {
  for (unsigned round = 0; round < 5; ++round) {
    SnapshotMemoryDisk disk(kSize);
    Mounted mounted(disk, MountpointKind::file);
    const auto entry = find_mount(mounted.point());
    REQUIRE(entry);
    auto daemons = control::Client::connect(entry->device, entry->user);
    REQUIRE(daemons.size() == 1);
    std::promise<bool> first;
    std::thread asking([&] {
      for (unsigned i = 0; i < 1'000'000; ++i) {
        const Json size = {{"size", kSize + i % 1000 * 4096}, {"shrink", true}};
        const bool answered = daemons[0].call("resize", size).has_value();
        if (i == 0) first.set_value(answered);
        if (!answered) return;
      }
    });
    CHECK(first.get_future().get());
    CHECK(mounted.stop());
    asking.join();
  }
}

}  // namespace
}  // namespace imgfuse::fuse
