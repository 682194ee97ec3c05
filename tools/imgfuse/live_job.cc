// imgfuse stream, and what commit shares with it.
#include "live_job.h"

#include <fmt/format.h>

#include <filesystem>

#include "control/jobs_json.h"
#include "target.h"
#include "text.h"
#include "watch_job.h"

namespace imgfuse::tool {

void add_live_options(CommandLine& line, LiveOptions& options) {
  line.size("--rate", options.rate, "Copy at most so many bytes per second");
  line.flag("--detach", options.detach, "Leave the job to the daemon, and do not wait");
}

Result<> run_chain_job(control::Client& daemon, JobKind kind, const std::optional<std::string>& base,
                       const LiveOptions& options, ShowProgress show, Io& io) {
  JobOptions job_options{.rate = options.rate, .kind = kind, .base = base};
  // The daemon is in another directory.
  if (base && std::filesystem::exists(*base)) job_options.base = std::filesystem::absolute(*base);
  const char* const command = kind == JobKind::stream ? "stream" : "commit";
  std::optional<Interruptions> interruptions;
  if (!options.detach) interruptions.emplace();
  IMG_LET(const control::Json answer, daemon.call(command, control::to_json(job_options)));
  const auto job = answer.at("job").get<uint64_t>();
  if (!interruptions) {
    io.out << fmt::format("job {}\n", job) << std::flush;
    return {};
  }
  IMG_LET(const JobStatus status,
          watch_job(daemon, job, WatchUntil::over, *interruptions, IfInterrupted::cancel, io, show));
  return outcome_of(status);
}

int run_stream(Io& io, Arguments args) {
  std::string mounted;
  std::optional<std::string> base;
  LiveOptions options;
  ShowProgress show = ShowProgress::on_terminal;
  CommandLine line("Copies what a mounted disk has from its backing chain into its own image, until it needs none.",
                   "imgfuse stream");
  line.text("MOUNT", mounted, "A mount point, or the image that is mounted").required();
  line.text("-b,--base", base, "The image of the backing chain that the disk keeps standing on", "LAYER");
  add_live_options(line, options);
  add_progress_options(line, show);
  if (const auto status = line.parse(io, args)) return *status;
  const auto stream = [&]() -> Result<> {
    IMG_LET(control::Client daemon, connect_to_daemon(mounted));
    return run_chain_job(daemon, JobKind::stream, base, options, show, io);
  };
  if (const auto streamed = stream(); !streamed) {
    print_error(io, mounted, streamed.error());
    return kFailure;
  }
  return kSuccess;
}

}  // namespace imgfuse::tool
