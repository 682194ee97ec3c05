#include "fuse/snapshot_folder.h"

#include <doctest/doctest.h>

#include <set>

#include "fuse/snapshot_disk.h"
#include "memory_snapshots.h"

namespace imgfuse::fuse {
namespace {

constexpr uint64_t kSize = 64_KiB;
constexpr NodeNumber kFolder = 3;
constexpr NodeNumber kFirst = 100;

std::vector<std::string> names_in(const SnapshotFolder& folder) {
  std::vector<std::string> names;
  for (const NodeRef& node : folder.children()) names.push_back(node->name);
  return names;
}

TEST_CASE("fuse snapshot folder: names are safe") {
  CHECK(safe_file_name("monday", "") == "monday.raw");
  CHECK(safe_file_name("a/b\n\x7f\x01", "~2") == "a_b___~2.raw");
  CHECK(safe_file_name("..", "") == "...raw");
  const std::string long_name = safe_file_name(std::string(300, 'x'), "~7");
  CHECK(long_name.size() == 255);
  CHECK(long_name.ends_with("x~7.raw"));
  // 251 bytes remain for the name: the 126th character of two bytes does not fit.
  std::string accents;
  for (unsigned i = 0; i < 200; ++i) accents += "\u00e9";
  CHECK(safe_file_name(accents, "") == accents.substr(0, 250) + ".raw");
  CHECK(safe_file_name(std::string(300, '\x80'), "").size() <= 255);
}

TEST_CASE("fuse snapshot folder: strange snapshots get different names, none of them special") {
  SnapshotMemoryDisk disk(kSize);
  const std::string slash = "a/b";
  for (const char* name : {"a", "a", "a/b", "a_b", "", "", ".", "..", "~a", "a~2"}) disk.add({.id = "2", .name = name});
  disk.add({.id = std::string(400, '/'), .name = std::string(400, 'y')});
  disk.add({.id = "", .name = ""});
  disk.add({.id = "../x", .name = "a"});
  for (unsigned i = 0; i < 2; ++i) disk.add({.id = "5", .name = std::string(400, 'y')});
  SnapshotFolder folder(disk, kFolder, kFirst, {});

  const auto names = names_in(folder);

  CHECK(names.size() == 15);
  CHECK(std::set<std::string>(names.begin(), names.end()).size() == names.size());
  for (const std::string& name : names) {
    CAPTURE(name);
    CHECK(name.size() <= 255);
    CHECK(name.find('/') == std::string::npos);
    CHECK((name != "." && name != ".." && name != ".raw"));
    CHECK(folder.find(name)->name == name);
  }
  CHECK(names[0] == "a.raw");
  CHECK(names[1] == "a~2.raw");
  CHECK(names[2] == "a_b.raw");
}

TEST_CASE("fuse snapshot folder: a file shows the snapshot's size and date, for readers only") {
  SnapshotMemoryDisk disk(kSize);
  disk.add({.id = "1", .name = "old", .date_sec = 1'600'000'000, .date_nsec = 5});
  REQUIRE(disk.resize(2 * kSize));
  SnapshotFolder folder(disk, kFolder, kFirst, {12, 34, 0664});

  const NodeRef node = folder.find("old.raw");

  REQUIRE(node);
  const struct stat attributes = node->file->attributes();
  CHECK(node->parent == kFolder);
  CHECK(node->number == kFirst);
  CHECK(attributes.st_size == kSize);
  CHECK(attributes.st_mode == (S_IFREG | 0444));
  CHECK(attributes.st_uid == 12);
  CHECK(attributes.st_mtim.tv_sec == 1'600'000'000);
  CHECK(attributes.st_mtim.tv_nsec == 5);
  CHECK(attributes.st_blocks > 0);
  CHECK(attributes.st_blocks * 512 < attributes.st_size);
  CHECK(node->file->read_only());
}

TEST_CASE("fuse snapshot folder: a snapshot is open only while somebody uses it") {
  SnapshotMemoryDisk disk(kSize);
  disk.add({.id = "1", .name = "a"});
  SnapshotFolder folder(disk, kFolder, kFirst, {});
  const NodeRef node = folder.find("a.raw");
  std::vector<std::byte> byte(1);

  CHECK(disk.open_count() == 0);
  CHECK(!node->file->disk().read(GuestOffset(0), byte));
  REQUIRE(node->snapshot->acquire());
  REQUIRE(node->snapshot->acquire());
  CHECK(disk.open_count() == 1);
  CHECK(node->file->disk().read(GuestOffset(0), byte));
  CHECK(node->file->disk().write(GuestOffset(0), byte).error().code() == ErrorCode::read_only);
  node->snapshot->release();
  CHECK(disk.open_count() == 1);
  node->snapshot->release();
  CHECK(disk.open_count() == 0);

  REQUIRE(node->snapshot->acquire());
  folder.close_all();
  CHECK(disk.open_count() == 0);
  CHECK(!node->file->disk().read(GuestOffset(0), byte));
  CHECK(!node->snapshot->acquire());
  node->snapshot->release();
}

TEST_CASE("fuse snapshot folder: snapshots come and go, and those that stay keep name and number") {
  SnapshotMemoryDisk disk(kSize);
  Snapshots& snapshots = *disk.snapshots();
  disk.add({.id = "1", .name = "a"});
  disk.add({.id = "2", .name = "a"});
  SnapshotFolder folder(disk, kFolder, kFirst, {});
  const NodeNumber second = folder.find("a~2.raw")->number;

  REQUIRE(snapshots.remove("1"));
  disk.add({.id = "1", .name = "b"});
  folder.refresh();

  CHECK(names_in(folder) == std::vector<std::string>{"a~2.raw", "b.raw"});
  CHECK(folder.find("a~2.raw")->number == second);
  CHECK(folder.find("a.raw") == nullptr);
  CHECK(folder.find(kFirst) == nullptr);
  CHECK(folder.find("b.raw")->number > second);
}

TEST_CASE("fuse snapshot folder: a later snapshot with the same id and name is another file") {
  SnapshotMemoryDisk disk(kSize);
  disk.add({.id = "1", .name = "a", .date_sec = 1});
  SnapshotFolder folder(disk, kFolder, kFirst, {});
  const NodeRef before = folder.find("a.raw");

  REQUIRE(disk.snapshots()->remove("1"));
  disk.add({.id = "1", .name = "a", .date_sec = 2});
  folder.refresh();

  CHECK(folder.find("a.raw")->number != before->number);
  CHECK(before->name == "a.raw");
}

}  // namespace
}  // namespace imgfuse::fuse
