// An image's own command that makes the device of its data longer. Only for users who have allowed it.
#pragma once

#include <cstdint>
#include <string>

#include "imgfuse/error.h"

namespace imgfuse {

/// Runs `command` as a program, without a shell, with two arguments: how many bytes more, and the file. The words of
/// the command before its first space are the program; more words are arguments in front. `builtin:lvextend` is
/// lvextend -L+<bytes>B <file>. Blocks until it ends; fails unless it ends with 0.
Result<> run_storage_command(const std::string& command, uint64_t bytes, const std::string& file);

}  // namespace imgfuse
