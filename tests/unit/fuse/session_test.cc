#include "fuse/session.h"

#include <dirent.h>
#include <doctest/doctest.h>
#include <linux/falloc.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <set>

#include "memory_disk.h"
#include "mounted.h"

namespace imgfuse::fuse {
namespace {

constexpr uint64_t kSize = 1_MiB;
constexpr MountpointKind kBoth[] = {MountpointKind::file, MountpointKind::directory};

ssize_t write_at(const Open& file, off_t offset, const std::string& text) {
  return ::pwrite(file.fd(), text.data(), text.size(), offset);
}

std::string content_at(MemoryDisk& disk, size_t offset, size_t length) {
  const auto content = disk.content();
  return std::string(reinterpret_cast<const char*>(content.data()) + offset, length);
}

TEST_CASE("fuse session: both kinds of mount point show the disk") {
  for (const MountpointKind kind : kBoth) {
    CAPTURE(static_cast<int>(kind));
    MemoryDisk disk(kSize);
    Mounted mounted(disk, kind);
    {
      const Open file(mounted.file());

      REQUIRE(write_at(file, 5000, "hello") == 5);
      CHECK(read_at(file, 4999, 7) == std::string("\0hello\0", 7));
      CHECK(content_at(disk, 5000, 5) == "hello");
      CHECK(::fsync(file.fd()) == 0);
      CHECK(disk.flushes() == 1);
    }
    CHECK(mounted.stop());
    CHECK(disk.closed());
    CHECK(!find_mount(mounted.point()));
  }
}

TEST_CASE("fuse session: a directory lists disk.raw and takes no other names") {
  MemoryDisk disk(kSize);
  Mounted mounted(disk, MountpointKind::directory);

  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(mounted.point())) names.insert(entry.path().filename());

  CHECK(names == std::set<std::string>{"disk.raw", "info.json", "stats.json"});
  CHECK(::open((mounted.point() + "/new").c_str(), O_CREAT | O_RDWR, 0600) == -1);
  CHECK(errno == EPERM);
  CHECK(::unlink(mounted.file().c_str()) == -1);
  CHECK(errno == EPERM);
  CHECK(::access((mounted.point() + "/other").c_str(), F_OK) == -1);
  CHECK(errno == ENOENT);
}

TEST_CASE("fuse session: stat shows size, unit, allocation and the time of the last change") {
  for (const MountpointKind kind : kBoth) {
    MemoryDisk disk(kSize + 512);
    MountOptions options;
    options.uid = 12;
    options.gid = 34;
    Mounted mounted(disk, kind, options);
    const Open file(mounted.file());

    struct stat before = file.attributes();
    CHECK(before.st_size == kSize + 512);
    CHECK(before.st_blksize == MemoryDisk::kUnit);
    CHECK(before.st_blocks == 0);
    CHECK(before.st_mode == (S_IFREG | 0600));
    CHECK(before.st_uid == 12);
    CHECK(before.st_gid == 34);
    CHECK(before.st_mtim.tv_sec == Mounted::kModified.tv_sec);
    CHECK(before.st_mtim.tv_nsec == Mounted::kModified.tv_nsec);

    write_at(file, 0, "x");
    CHECK(file.attributes().st_blocks == 8);
    CHECK(file.attributes().st_mtim.tv_sec > Mounted::kModified.tv_sec);
  }
}

TEST_CASE("fuse session: umask opens the file to others, chmod and chown do not") {
  MemoryDisk disk(kSize);
  MountOptions options;
  options.umask = 022;
  Mounted mounted(disk, MountpointKind::directory, options);
  const Open file(mounted.file());

  CHECK(file.attributes().st_mode == (S_IFREG | 0644));
  struct stat directory;
  REQUIRE(::stat(mounted.point().c_str(), &directory) == 0);
  CHECK(directory.st_mode == (S_IFDIR | 0555));
  CHECK(::fchmod(file.fd(), 0644) == 0);
  CHECK(::fchmod(file.fd(), 0666) == -1);
  CHECK(errno == EPERM);
  const timespec times[] = {{1, 0}, {2, 0}};
  CHECK(::futimens(file.fd(), times) == 0);
  CHECK(file.attributes().st_mtim.tv_sec == 2);
}

TEST_CASE("fuse session: reads end at the end of the disk, writes find no space behind it") {
  for (const int direct : {0, O_DIRECT}) {
    CAPTURE(direct);
    MemoryDisk disk(kSize);
    Mounted mounted(disk, MountpointKind::file);
    const Open file(mounted.file(), O_RDWR | direct);
    alignas(4096) static char page[8192] = {};

    CHECK(::pread(file.fd(), page, 8192, kSize - 4096) == 4096);
    CHECK(::pread(file.fd(), page, 4096, kSize) == 0);
    std::memset(page, 'x', sizeof page);
    CHECK(::pwrite(file.fd(), page, 8192, kSize - 4096) == (direct ? -1 : 4096));
    CHECK(content_at(disk, kSize - 1, 1) == "x");
    CHECK(::pwrite(file.fd(), page, 4096, kSize) == -1);
    CHECK(errno == ENOSPC);
    CHECK(disk.size() == kSize);
  }
}

TEST_CASE("fuse session: truncate grows the disk, shrinking is refused, O_TRUNC changes nothing") {
  for (const MountpointKind kind : kBoth) {
    MemoryDisk disk(kSize);
    Mounted mounted(disk, kind);
    const Open file(mounted.file());
    write_at(file, 0, "kept");

    CHECK(::ftruncate(file.fd(), 2 * kSize) == 0);
    CHECK(file.attributes().st_size == 2 * kSize);
    CHECK(write_at(file, kSize, "more") == 4);
    CHECK(::ftruncate(file.fd(), kSize) == -1);
    CHECK(errno == EOPNOTSUPP);
    CHECK(file.attributes().st_size == 2 * kSize);

    const Open truncated(mounted.file(), O_RDWR | O_TRUNC);
    CHECK(truncated.attributes().st_size == 2 * kSize);
    CHECK(read_at(truncated, 0, 4) == "kept");
  }
}

TEST_CASE("fuse session: fallocate punches, zeroes, allocates and grows") {
  MemoryDisk disk(kSize);
  Mounted mounted(disk, MountpointKind::file);
  const Open file(mounted.file());
  const off_t unit = MemoryDisk::kUnit;
  write_at(file, 0, std::string(64 * 1024, 'x'));
  REQUIRE(file.attributes().st_blocks == 128);

  CHECK(::fallocate(file.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, unit, unit) == 0);
  CHECK(file.attributes().st_blocks == 120);
  CHECK(::fallocate(file.fd(), FALLOC_FL_ZERO_RANGE, 3 * unit, 10) == 0);
  CHECK(read_at(file, unit, 1) == std::string(1, '\0'));
  CHECK(read_at(file, 2 * unit, 1) == "x");
  CHECK(read_at(file, 3 * unit + 9, 2) == std::string("\0x", 2));

  CHECK(::fallocate(file.fd(), 0, kSize - unit, 2 * unit) == 0);
  CHECK(file.attributes().st_size == kSize + unit);
  CHECK(file.attributes().st_blocks == 136);
  CHECK(::fallocate(file.fd(), FALLOC_FL_KEEP_SIZE, kSize, 4 * unit) == 0);
  CHECK(::fallocate(file.fd(), FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, kSize, 4 * unit) == 0);
  CHECK(file.attributes().st_size == kSize + unit);
  CHECK(::fallocate(file.fd(), FALLOC_FL_ZERO_RANGE, kSize, 2 * unit) == 0);
  CHECK(file.attributes().st_size == kSize + 2 * unit);
  CHECK(::fallocate(file.fd(), FALLOC_FL_COLLAPSE_RANGE, 0, unit) == -1);
  CHECK(errno == EOPNOTSUPP);
}

TEST_CASE("fuse session: SEEK_DATA and SEEK_HOLE follow the map") {
  MemoryDisk disk(kSize);
  Mounted mounted(disk, MountpointKind::file);
  const Open file(mounted.file());
  write_at(file, 8192, std::string(4096, 'x'));
  write_at(file, 12288, std::string(100, 'y'));

  CHECK(::lseek(file.fd(), 0, SEEK_DATA) == 8192);
  CHECK(::lseek(file.fd(), 9000, SEEK_DATA) == 9000);
  CHECK(::lseek(file.fd(), 8192, SEEK_HOLE) == 16384);
  CHECK(::lseek(file.fd(), 100, SEEK_HOLE) == 100);
  CHECK(::lseek(file.fd(), 16384, SEEK_DATA) == -1);
  CHECK(errno == ENXIO);
  CHECK(::lseek(file.fd(), kSize, SEEK_HOLE) == -1);
  CHECK(errno == ENXIO);
  write_at(file, kSize - 1, "z");
  CHECK(::lseek(file.fd(), kSize - 1, SEEK_HOLE) == kSize);
}

TEST_CASE("fuse session: a shared mapping reaches the disk, also when the session is stopped with dirty pages") {
  for (const bool writeback : {false, true}) {
    for (const MountpointKind kind : kBoth) {
      CAPTURE(writeback);
      CAPTURE(static_cast<int>(kind));
      MemoryDisk disk(kSize);
      MountOptions options;
      options.writeback_cache = writeback;
      Mounted mounted(disk, kind, options);
      const Open file(mounted.file());
      CHECK(file.attributes().st_size == kSize);
      CHECK(file.attributes().st_mtim.tv_sec == Mounted::kModified.tv_sec);
      void* const memory = ::mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_SHARED, file.fd(), 0);
      REQUIRE(memory != MAP_FAILED);
      char* const bytes = static_cast<char*>(memory);

      std::memcpy(bytes + 100, "mapped", 6);
      CHECK(read_at(file, 100, 6) == "mapped");
      CHECK(::msync(memory, kSize, MS_SYNC) == 0);
      CHECK(content_at(disk, 100, 6) == "mapped");
      std::memcpy(bytes + 5000, "later", 5);
      CHECK(mounted.stop());

      CHECK(content_at(disk, 5000, 5) == "later");
      ::munmap(memory, kSize);
    }
  }
}

TEST_CASE("fuse session: a read-only disk is mounted read-only") {
  MemoryDisk disk(kSize, true);
  MountOptions options;
  options.writeback_cache = true;
  Mounted mounted(disk, MountpointKind::file, options);

  const Open file(mounted.file(), O_RDONLY);
  CHECK(file.attributes().st_mode == (S_IFREG | 0400));
  CHECK(read_at(file, kSize - 1, 2).size() == 1);
  CHECK(::open(mounted.file().c_str(), O_RDWR) == -1);
  CHECK(errno == EROFS);
  CHECK(::truncate(mounted.file().c_str(), 2 * kSize) == -1);
  CHECK(errno == EROFS);
}

TEST_CASE("fuse session: errors of the disk reach the caller, and the one of closing who serves") {
  MemoryDisk disk(kSize);
  Mounted mounted(disk, MountpointKind::file);
  {
    const Open file(mounted.file());
    disk.fail_with(Error(ErrorCode::no_space, "disk full"));
    CHECK(write_at(file, 0, "x") == -1);
    CHECK(errno == ENOSPC);
    disk.fail_with(Error(ErrorCode::io, "broken"));
    CHECK(::fsync(file.fd()) == -1);
    CHECK(errno == EIO);
  }

  const auto closed = mounted.stop();

  REQUIRE(!closed);
  CHECK(closed.error().text() == "broken");
}

TEST_CASE("fuse session: statfs tells the disk's size and what is not allocated") {
  MemoryDisk disk(kSize);
  Mounted mounted(disk, MountpointKind::directory);
  write_at(Open(mounted.file()), 0, std::string(8192, 'x'));

  struct statvfs statistics;
  REQUIRE(::statvfs(mounted.point().c_str(), &statistics) == 0);

  CHECK(statistics.f_blocks * statistics.f_frsize == kSize);
  CHECK(statistics.f_bavail * statistics.f_frsize == kSize - 8192);
}

TEST_CASE("fuse session: unmounting ends it, with one thread as with many") {
  for (const bool single_threaded : {true, false}) {
    MemoryDisk disk(kSize);
    MountOptions options;
    options.single_threaded = single_threaded;
    Mounted mounted(disk, MountpointKind::file, options);
    write_at(Open(mounted.file()), 0, "x");

    REQUIRE(::umount2(mounted.point().c_str(), UMOUNT_NOFOLLOW) == 0);

    CHECK(mounted.wait());
    CHECK(disk.closed());
  }
}

TEST_CASE("fuse session: SIGTERM ends it, and nothing else") {
  for (const int number : {SIGTERM, SIGINT, SIGHUP}) {
    MemoryDisk disk(kSize);
    Mounted mounted(disk, MountpointKind::file);
    // Blocked here, so that it waits for the thread that asks for it.
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, number);
    pthread_sigmask(SIG_BLOCK, &set, nullptr);

    REQUIRE(::kill(::getpid(), number) == 0);

    CHECK(mounted.wait());
    CHECK(disk.closed());
    CHECK(!find_mount(mounted.point()));
    pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
  }
}

TEST_CASE("fuse session: the mount is found by its path, and a second one there is refused") {
  MemoryDisk disk(kSize);
  MountOptions options;
  options.fsname = "a b,c\\d";
  Mounted mounted(disk, MountpointKind::directory, options);

  const auto entry = find_mount(mounted.point());
  const auto again = check_mountpoint(mounted.point(), "/image");

  REQUIRE(entry);
  CHECK(entry->type == "fuse.imgfuse");
  CHECK(entry->source == "a b,c\\d");
  CHECK(entry->user == ::geteuid());
  REQUIRE(!again);
  CHECK(again.error().code() == ErrorCode::busy);
}

}  // namespace
}  // namespace imgfuse::fuse
