#include "open/storage_command.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <sstream>
#include <vector>

#include "open/path_policy.h"
#include "storage/host_file.h"

namespace imgfuse {
namespace {

std::vector<std::string> words_of(const std::string& command, uint64_t bytes, const std::string& file) {
  if (command == "builtin:lvextend") return {"/sbin/lvextend", fmt::format("-L+{}B", bytes), file};
  std::istringstream text(command);
  std::vector<std::string> words;
  for (std::string word; text >> word;) words.push_back(word);
  words.push_back(fmt::format("{}", bytes));
  words.push_back(file);
  return words;
}

}  // namespace

Result<> run_storage_command(const std::string& command, uint64_t bytes, const std::string& file) {
  std::vector<std::string> words = words_of(command, bytes, file);
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    posix_spawn_file_actions_addopen(&actions, fd, "/dev/null", O_RDWR, 0);
  pid_t child = 0;
  const int error = posix_spawnp(&child, arguments[0], &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return fail(host_error(error, fmt::format("run {}", printable(words[0]))));
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) return fail(host_error(errno, fmt::format("wait for {}", printable(words[0]))));
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
    return fail(ErrorCode::no_space, "the image's command {} did not make the device longer", printable(words[0]));
  return {};
}

}  // namespace imgfuse
