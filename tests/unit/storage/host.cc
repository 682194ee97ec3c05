#include "unit/storage/host.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <fstream>
#include <iterator>

namespace imgfuse::test {
namespace {

std::vector<char*> argv_of(const std::vector<std::string>& command) {
  std::vector<char*> argv;
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  return argv;
}

/// Starts a program with these as its stdin and its stdout and stderr.
pid_t start(const std::vector<std::string>& command, int input, int output) {
  const std::vector<char*> argv = argv_of(command);
  const pid_t pid = fork();
  REQUIRE(pid >= 0);
  if (pid != 0) return pid;
  dup2(input, STDIN_FILENO);
  dup2(output, STDOUT_FILENO);
  dup2(output, STDERR_FILENO);
  execvp(argv[0], argv.data());
  _exit(127);
}

std::array<int, 2> make_pipe() {
  std::array<int, 2> ends;
  REQUIRE(pipe2(ends.data(), O_CLOEXEC) == 0);
  return ends;
}

}  // namespace

TempDir::TempDir(const std::string& parent) : path_(parent + "/imgfuse-test-XXXXXX") {
  REQUIRE(mkdtemp(path_.data()) != nullptr);
  path_ = std::filesystem::canonical(path_);
}

TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

void write_file(const std::string& path, ConstBytes content) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(content.data()), static_cast<std::streamsize>(content.size()));
  REQUIRE(file.good());
}

void make_file(const std::string& path, uint64_t size) {
  write_file(path, {});
  REQUIRE(truncate(path.c_str(), static_cast<off_t>(size)) == 0);
}

std::vector<std::byte> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
  return {bytes, bytes + text.size()};
}

Outcome run(const std::vector<std::string>& command) {
  const auto [from, to] = make_pipe();
  const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
  const pid_t pid = start(command, null, to);
  close(to);
  close(null);

  Outcome outcome;
  std::array<char, 4096> buffer;
  for (ssize_t n; (n = read(from, buffer.data(), buffer.size())) > 0;)
    outcome.output.append(buffer.data(), static_cast<size_t>(n));
  close(from);
  int status = 0;
  waitpid(pid, &status, 0);
  if (WIFEXITED(status)) outcome.status = WEXITSTATUS(status);
  return outcome;
}

bool installed(const std::string& program) { return run({program, "--version"}).status == 0; }

QemuIo::QemuIo(const std::vector<std::string>& arguments, const std::string& image) {
  const auto [commands_from, commands_to] = make_pipe();
  const auto [output_from, output_to] = make_pipe();
  std::vector<std::string> command{"qemu-io"};
  command.insert(command.end(), arguments.begin(), arguments.end());
  command.push_back(image);
  pid_ = start(command, commands_from, output_to);
  commands_ = commands_to;
  output_ = output_from;
  close(commands_from);
  close(output_to);

  // The answer to the first command tells that the image is open, and locked.
  const std::string question = "length\n";
  REQUIRE(write(commands_, question.data(), question.size()) == static_cast<ssize_t>(question.size()));
  std::string answer;
  for (char c = 0; answer.find("iB\n") == std::string::npos && read(output_, &c, 1) == 1;) answer += c;
  REQUIRE_MESSAGE(answer.find("iB\n") != std::string::npos, answer);
}

QemuIo::~QemuIo() {
  close(commands_);
  int status = 0;
  waitpid(pid_, &status, 0);
  close(output_);
}

}  // namespace imgfuse::test
