// imgfuse jobs and imgfuse job: what works on a mounted disk, and orders to it.
#include <fmt/format.h>

#include "command_line.h"
#include "job_list.h"
#include "target.h"
#include "text.h"
#include "watch_job.h"

namespace imgfuse::tool {
namespace {

using control::Json;

Result<> list_jobs(Io& io, const std::string& mounted, bool json) {
  IMG_LET(control::Client daemon, connect_to_daemon(mounted));
  IMG_LET(const Json list, daemon.call("jobs"));
  if (json)
    io.out << control::to_text(list) << "\n";
  else
    print_jobs(io, list);
  io.out << std::flush;
  return {};
}

struct Order {
  std::string action;
  std::string mounted;
  uint64_t job = 0;
  uint64_t rate = 0;
  ShowProgress show = ShowProgress::on_terminal;
};

Result<> give(Io& io, const Order& order) {
  IMG_LET(control::Client daemon, connect_to_daemon(order.mounted));
  if (order.action == "wait") {
    const Interruptions interruptions;
    IMG_LET(const JobStatus status,
            watch_job(daemon, order.job, WatchUntil::over, interruptions, IfInterrupted::leave, io, order.show));
    if (!is_over(status.state) && !status.error) return fail(ErrorCode::busy, "job {} goes on", order.job);
    return outcome_of(status);
  }
  Json arguments = {{"job", order.job}};
  if (order.action == "set-rate") arguments["rate"] = order.rate;
  IMG_TRY(daemon.call("job-" + order.action, arguments));
  return {};
}

void add_action(CommandLine& line, Order& order, const std::string& action, const std::string& description) {
  CommandLine command = line.add_action(action, description);
  command.text("MOUNT", order.mounted, "A mount point, or the image that is mounted").required();
  command.number("JOB", order.job, "The job's number", "NUMBER").required();
  if (action == "set-rate") command.size("RATE", order.rate, "Bytes per second; 0: no limit").required();
}

}  // namespace

int run_jobs(Io& io, Arguments args) {
  std::string mounted;
  bool json = false;
  CommandLine line("Lists the jobs on a mounted disk, those that are over too.", "imgfuse jobs");
  line.text("MOUNT", mounted, "A mount point, or the image that is mounted").required();
  add_json_option(line, json);
  if (const auto status = line.parse(io, args)) return *status;
  if (const auto listed = list_jobs(io, mounted, json); !listed) {
    print_error(io, mounted, listed.error());
    return kFailure;
  }
  return kSuccess;
}

int run_job(Io& io, Arguments args) {
  Order order;
  CommandLine line("Pauses, resumes, ends or waits for a job on a mounted disk.", "imgfuse job");
  add_action(line, order, "pause", "Copy nothing until it is resumed; what changes is remembered");
  add_action(line, order, "resume", "Go on, after an error too");
  add_action(line, order, "cancel", "End it; its target is worth nothing");
  add_action(line, order, "complete", "When both are alike the target of a mirror takes the image's place");
  add_action(line, order, "finish", "When both are alike the target of a mirror is left as a copy");
  add_action(line, order, "set-rate", "Limit how fast it copies");
  add_action(line, order, "wait", "Return when it is over; exit status 1 if it failed or was cancelled");
  add_progress_options(line, order.show, "wait: show no progress", "wait: show progress, not only on a terminal");
  if (const auto status = line.parse(io, args)) return *status;
  order.action = line.chosen_action();
  if (const auto given = give(io, order); !given) {
    print_error(io, order.mounted, given.error());
    return kFailure;
  }
  return kSuccess;
}

}  // namespace imgfuse::tool
