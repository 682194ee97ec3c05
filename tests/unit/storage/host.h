// What tests of host files need from the host: a directory of their own, and other programs.
#pragma once

#include <doctest/doctest.h>
#include <sys/types.h>

#include <filesystem>
#include <string>
#include <vector>

#include "imgfuse/storage.h"

namespace imgfuse::test {

/// A directory that is gone when this is. `parent` chooses the file system.
class TempDir {
 public:
  explicit TempDir(const std::string& parent = std::filesystem::temp_directory_path());
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

void write_file(const std::string& path, ConstBytes content);
/// A sparse file.
void make_file(const std::string& path, uint64_t size);
std::vector<std::byte> read_file(const std::string& path);

struct Outcome {
  int status = -1;     ///< exit status, -1 if a signal ended it
  std::string output;  ///< stdout and stderr
};
Outcome run(const std::vector<std::string>& command);
bool installed(const std::string& program);

/// qemu-io with an image open, until this is destroyed. It reads commands from a pipe that says nothing.
class QemuIo {
 public:
  QemuIo(const std::vector<std::string>& arguments, const std::string& image);
  ~QemuIo();
  QemuIo(const QemuIo&) = delete;
  QemuIo& operator=(const QemuIo&) = delete;

  pid_t pid() const { return pid_; }

 private:
  int commands_ = -1;
  int output_ = -1;
  pid_t pid_ = -1;
};

}  // namespace imgfuse::test
