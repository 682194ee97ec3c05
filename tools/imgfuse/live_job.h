// Jobs on the chain of a mounted disk, as subcommands start them.
#pragma once

#include <optional>
#include <string>

#include "command_line.h"
#include "control/client.h"
#include "imgfuse/jobs.h"
#include "progress.h"

namespace imgfuse::tool {

struct LiveOptions {
  uint64_t rate = 0;
  bool detach = false;
};
/// --rate and --detach.
void add_live_options(CommandLine& line, LiveOptions& options);

/// Starts a stream or a commit and waits for its end, unless it is to be left to the daemon; its number is printed
/// then. Who is interrupted cancels it.
Result<> run_chain_job(control::Client& daemon, JobKind kind, const std::optional<std::string>& base,
                       const LiveOptions& options, ShowProgress show, Io& io);

}  // namespace imgfuse::tool
