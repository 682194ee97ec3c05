// A disk on a real mount, served by a thread of the test.
#pragma once

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <memory>
#include <string>
#include <thread>

#include "base/unique_fd.h"
#include "fuse/session.h"

namespace imgfuse::fuse {

/// A folder that goes away with the test.
class TemporaryFolder {
 public:
  TemporaryFolder() : path_(::mkdtemp(name_)) {}
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

 private:
  char name_[32] = "/tmp/imgfuse-test-XXXXXX";
  std::string path_;
};

/// Mounts in the constructor; stop() or the destructor ends it.
class Mounted {
 public:
  static constexpr timespec kModified = {1'000'000'000, 123'000'000};

  Mounted(Disk& disk, MountpointKind kind, const MountOptions& options = {}) {
    path_ = folder_.path() + "/point";
    if (kind == MountpointKind::file)
      std::ofstream(path_) << "covered";
    else
      std::filesystem::create_directory(path_);
    std::promise<void> ready;
    thread_ = std::thread([&, kind, options] {
      auto session = Session::mount(disk, {"/image", kModified}, {path_, kind}, options);
      if (!session) {
        result_ = fail(session.error());
        ready.set_value();
        return;
      }
      session_ = session->get();
      result_ = session_->serve([&ready] { ready.set_value(); });
    });
    ready.get_future().wait();
    INFO((result_ ? "" : result_.error().text()));
    REQUIRE(session_ != nullptr);
    file_ = kind == MountpointKind::file ? path_ : path_ + "/disk.raw";
  }
  ~Mounted() { (void)stop(); }

  const std::string& point() const { return path_; }
  const std::string& file() const { return file_; }
  Session& session() { return *session_; }
  /// Waits for the end that came from elsewhere.
  Result<> wait() {
    if (thread_.joinable()) thread_.join();
    return result_;
  }
  Result<> stop() {
    if (thread_.joinable()) session_->stop();
    return wait();
  }

 private:
  TemporaryFolder folder_;
  std::string path_;
  std::string file_;
  std::thread thread_;
  Session* session_ = nullptr;
  Result<> result_;
};

/// A descriptor of the presented file.
class Open {
 public:
  explicit Open(const std::string& path, int flags = O_RDWR) : fd_(::open(path.c_str(), flags | O_CLOEXEC)) {
    REQUIRE(fd_.get() >= 0);
  }
  int fd() const { return fd_.get(); }
  struct stat attributes() const {
    struct stat attributes;
    REQUIRE(::fstat(fd(), &attributes) == 0);
    return attributes;
  }

 private:
  UniqueFd fd_;
};

inline std::string read_at(const Open& file, off_t offset, size_t length) {
  std::string text(length, '?');
  const ssize_t n = ::pread(file.fd(), text.data(), length, offset);
  REQUIRE(n >= 0);
  text.resize(static_cast<size_t>(n));
  return text;
}

}  // namespace imgfuse::fuse
