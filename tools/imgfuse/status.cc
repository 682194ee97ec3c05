// imgfuse list and imgfuse status: the mounts of this user, and what one of them has done.
#include <fmt/format.h>
#include <unistd.h>

#include "command_line.h"
#include "control/jobs_json.h"
#include "control/statistics_json.h"
#include "fuse/mountpoint.h"
#include "job_list.h"
#include "target.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

using control::Client;
using control::Json;

/// Who is asked may be stopped, or busy with something else.
constexpr std::chrono::seconds kPatience(5);

Json describe(Client& daemon, const fuse::MountEntry& mounted) {
  Json json = {{"mountpoint", mounted.path}, {"image", mounted.source}, {"pid", daemon.pid()}};
  if (const auto info = daemon.call("info", Json::object(), kPatience)) {
    json["image"] = info->value("image", mounted.source);
    json["format"] = info->value("format", "");
    json["virtual-size"] = info->value("virtual-size", uint64_t{0});
    json["jobs"] = daemon.call("jobs", Json::object(), kPatience).value_or(Json::array());
  } else {
    json["error"] = control::to_json(info.error());
  }
  return json;
}

/// Mounts whose daemon is gone are listed without a process.
Json list_mounts() {
  Json list = Json::array();
  for (const fuse::MountEntry& mounted : fuse::mount_table()) {
    if (!fuse::is_fuse(mounted) || (::geteuid() != 0 && mounted.user != ::geteuid())) continue;
    auto daemons = Client::connect(mounted.device, mounted.user);
    if (!daemons.empty())
      list.push_back(describe(daemons.back(), mounted));
    else if (mounted.type == "fuse.imgfuse")
      list.push_back({{"mountpoint", mounted.path}, {"image", mounted.source}});
  }
  return list;
}

std::string running_jobs(const Json& mounted) {
  std::string text;
  for (const Json& json : mounted.value("jobs", Json::array()))
    if (const JobStatus job = control::job_from_json(json); !is_over(job.state))
      text += fmt::format("{}{} {} ({})", text.empty() ? "" : ", ", job.kind, job.id, control::to_word(job.state));
  return text.empty() ? "-" : text;
}

void print_mounts(Io& io, const Json& list) {
  if (!list.empty()) io.out << fmt::format("{:>8}  {:<7}{:<24}{:<24}{}\n", "PID", "FORMAT", "JOBS", "MOUNT", "IMAGE");
  for (const Json& mounted : list) {
    const std::string pid = mounted.contains("pid") ? std::to_string(mounted.at("pid").get<int>()) : "gone";
    io.out << fmt::format("{:>8}  {:<7}{:<23} {:<23} {}\n", pid, mounted.value("format", "?"), running_jobs(mounted),
                          printable(mounted.at("mountpoint").get<std::string>()),
                          printable(mounted.at("image").get<std::string>()));
  }
}

std::string share_of(uint64_t part, uint64_t rest) {
  if (part + rest == 0) return "-";
  return fmt::format("{:.1f} %", 100.0 * static_cast<double>(part) / static_cast<double>(part + rest));
}

void print_requests(Io& io, const Json& statistics) {
  io.out << fmt::format("{:<12}{:>12}{:>8}{:>11}{:>12}{:>12}{:>12}\n", "REQUESTS", "", "FAILED", "BYTES", "50 % BELOW",
                        "99 % BELOW", "ALL BELOW");
  for (const char* const kind : {"reads", "writes", "zeroings", "flushes"}) {
    const Json& requests = statistics.at(kind);
    const auto below = [&](double share) { return fmt::format("{} us", control::latency_of_share(requests, share)); };
    io.out << fmt::format("{:<12}{:>12}{:>8}{:>11}{:>12}{:>12}{:>12}\n", kind, requests.at("requests").get<uint64_t>(),
                          requests.at("failed").get<uint64_t>(), human_size(requests.at("bytes").get<uint64_t>()),
                          below(0.5), below(0.99), below(1));
  }
}

void print_status(Io& io, const Json& status) {
  const auto number = [](const Json& json, const char* name) { return json.at(name).get<uint64_t>(); };
  const Json& info = status.at("info");
  const Json& statistics = status.at("statistics");
  io.out << fmt::format("image: {}\nmount: {}\nformat: {}, {} ({} bytes)\n",
                        printable(info.at("image").get<std::string>()),
                        printable(info.at("mountpoint").get<std::string>()), info.at("format").get<std::string>(),
                        human_size(number(info, "virtual-size")), number(info, "virtual-size"));
  print_requests(io, statistics);
  io.out << fmt::format("tables: {} in memory, {} of them changed; {} found there\n", number(statistics, "tables"),
                        number(statistics, "dirty-tables"),
                        share_of(number(statistics, "table-hits"), number(statistics, "table-loads")));
  io.out << fmt::format("compressed clusters: {} found in memory\n",
                        share_of(number(statistics, "cluster-hits"), number(statistics, "clusters-inflated")));
  io.out << fmt::format("flush cycles: {}\nquarantine: {}\n", number(statistics, "flush-cycles"),
                        human_size(number(statistics, "quarantine")));
  print_jobs(io, status.at("jobs"));
}

Result<> show_status(Io& io, const std::string& mounted, bool json) {
  IMG_LET(Client daemon, connect_to_daemon(mounted));
  Json status = Json::object();
  for (const char* const part : {"info", "statistics", "jobs"}) {
    IMG_LET(status[part], daemon.call(part));
  }
  if (json)
    io.out << control::to_text(status) << "\n";
  else
    print_status(io, status);
  io.out << std::flush;
  return {};
}

}  // namespace

int run_list(Io& io, Arguments args) {
  bool json = false;
  CommandLine line("Lists what this user has mounted; for root, everything.", "imgfuse list");
  add_json_option(line, json);
  if (const auto status = line.parse(io, args)) return *status;
  const Json list = list_mounts();
  if (json)
    io.out << control::to_text(list) << "\n";
  else
    print_mounts(io, list);
  io.out << std::flush;
  return kSuccess;
}

int run_status(Io& io, Arguments args) {
  std::string mounted;
  bool json = false;
  CommandLine line("Says what a mounted disk has done: requests, how long they took, caches, jobs.", "imgfuse status");
  line.text("MOUNT", mounted, "A mount point, or the image that is mounted").required();
  add_json_option(line, json);
  if (const auto status = line.parse(io, args)) return *status;
  if (const auto shown = show_status(io, mounted, json); !shown) {
    print_error(io, mounted, shown.error());
    return kFailure;
  }
  return kSuccess;
}

}  // namespace imgfuse::tool
