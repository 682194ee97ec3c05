#include "qemu.h"

#include <doctest/doctest.h>
#include <fmt/core.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <nlohmann/json.hpp>
#include <span>

#include "base/endian.h"

namespace imgfuse::test {
namespace {

class TemporaryFile {
 public:
  TemporaryFile() {
    char name[] = "/tmp/imgfuse-qemu-XXXXXX";
    const int fd = ::mkstemp(name);
    REQUIRE(fd >= 0);
    ::close(fd);
    path_ = name;
  }
  ~TemporaryFile() {
    ::unlink(path_.c_str());
    ::unlink((path_ + ".data").c_str());  // where a command keeps the data apart
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

struct Output {
  int status;
  std::string text;
};

Output run(const std::string& command) {
  FILE* pipe = ::popen(command.c_str(), "r");
  REQUIRE(pipe);
  Output output{0, {}};
  char piece[4096];
  for (size_t n; (n = std::fread(piece, 1, sizeof piece, pipe)) > 0;) output.text.append(piece, n);
  const int status = ::pclose(pipe);
  output.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return output;
}

std::string with_path(std::string command, const std::string& path) {
  for (size_t at; (at = command.find("{}")) != std::string::npos;) command.replace(at, 2, path);
  return command;
}

void run_on(const std::string& command, const std::string& path) {
  const Output output = run(with_path(command, path) + " 2>&1");
  if (output.status != 0) FAIL(command << ": " << output.text);
}

}  // namespace

bool have_qemu() {
  static const bool found = run("qemu-img --version 2>/dev/null").status == 0;
  if (!found) MESSAGE("qemu-img is not installed: not compared");
  return found;
}

QemuCheck qemu_check(const MemImage& image) {
  const TemporaryFile file;
  const TemporaryFile errors;
  image.save(file.path());
  be<uint32_t> crypt_method;
  image.read(32, std::as_writable_bytes(std::span(&crypt_method, 1)));
  const std::string what = crypt_method == 0
                               ? "-f qcow2 " + file.path()
                               : "--object secret,id=s,data=x --image-opts driver=qcow2,encrypt.format=luks,"
                                 "encrypt.key-secret=s,file.filename=" +
                                     file.path();
  const Output output = run(fmt::format("qemu-img check --output=json {} 2>{}", what, errors.path()));
  QemuCheck check;
  check.status = output.status;
  check.errors = run("cat " + errors.path()).text;
  const auto json = nlohmann::json::parse(output.text, nullptr, false);
  if (!json.is_object()) return check;
  const auto get = [&](const char* key) { return json.value(key, uint64_t{0}); };
  check.report.corruptions = get("corruptions");
  check.report.leaks = get("leaks");
  check.report.check_errors = get("check-errors");
  check.report.total_clusters = get("total-clusters");
  check.report.allocated_clusters = get("allocated-clusters");
  check.report.compressed_clusters = get("compressed-clusters");
  check.report.fragmented_clusters = get("fragmented-clusters");
  check.report.image_end_offset = get("image-end-offset");
  return check;
}

MemImage after_command(const MemImage& image, const std::string& command) {
  const TemporaryFile file;
  image.save(file.path());
  run_on(command, file.path());
  return MemImage::load(file.path());
}

MemImage made_by(const std::string& command) {
  const TemporaryFile file;
  run_on(command, file.path());
  return MemImage::load(file.path());
}

}  // namespace imgfuse::test
