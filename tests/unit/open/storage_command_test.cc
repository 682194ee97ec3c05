// Images' own commands: run as programs, without a shell.
#include "open/storage_command.h"

#include <doctest/doctest.h>
#include <sys/stat.h>

#include <fstream>
#include <sstream>

#include "../storage/host.h"
#include "support/must.h"

namespace imgfuse::test {
namespace {

/// A program that writes down its arguments, one a line.
std::string recorder(const TempDir& folder) {
  const std::string program = folder / "recorder";
  std::ofstream(program) << "#!/bin/sh\nfor word; do echo \"$word\"; done > " << (folder / "said") << "\n";
  REQUIRE(::chmod(program.c_str(), 0755) == 0);
  return program;
}

std::string content(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

}  // namespace

TEST_CASE("storage command: gets the bytes and the device as its last two arguments") {
  const TempDir folder;

  must(run_storage_command(recorder(folder) + " -v  more", 1048576, "/dev/a device"));

  CHECK(content(folder / "said") == "-v\nmore\n1048576\n/dev/a device\n");
}

TEST_CASE("storage command: no shell reads it") {
  const TempDir folder;

  must(run_storage_command(recorder(folder) + " ;touch $HOME `id` >x", 1, "$(id)"));

  CHECK(content(folder / "said") == ";touch\n$HOME\n`id`\n>x\n1\n$(id)\n");
}

TEST_CASE("storage command: one that fails, or is not there, is an error") {
  const auto failed = run_storage_command("false", 1, "/dev/null");
  REQUIRE_FALSE(failed);
  CHECK(failed.error().code() == ErrorCode::no_space);

  CHECK_FALSE(run_storage_command("/nonexistent/program", 1, "/dev/null"));
}

}  // namespace imgfuse::test
