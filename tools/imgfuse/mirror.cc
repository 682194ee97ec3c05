// imgfuse mirror and imgfuse backup: copy a mounted disk to another image while it is in use.
#include <fmt/format.h>
#include <sys/stat.h>

#include <filesystem>

#include "command_line.h"
#include "control/jobs_json.h"
#include "create_options.h"
#include "imgfuse/check.h"
#include "imgfuse/create.h"
#include "open_disk.h"
#include "target.h"
#include "text.h"
#include "watch_job.h"

namespace imgfuse::tool {
namespace {

using control::Json;

struct Request {
  std::string mounted;  ///< mount point or image
  std::string target;   ///< empty: an order to the mirror that runs
  JobOptions mirror;
  CreateOptions create;
  bool has_create_options = false;
  bool complete = false;
  bool finish = false;
  bool cancel = false;
  bool replace = false;       ///< a target that is there, with a new image
  bool use_existing = false;  ///< write into it as it is
  bool detach = false;
  ShowProgress show = ShowProgress::on_terminal;

  bool is_backup() const { return mirror.kind == JobKind::backup; }
  const char* kind() const { return is_backup() ? "backup" : "mirror"; }
  const char* order() const { return complete ? "complete" : finish ? "finish" : cancel ? "cancel" : nullptr; }
};

/// The backing file that the disk has now, as the target in its own folder can name it.
Result<> share_backing(const Json& mounted, Request& request) {
  const std::string image = mounted.at("image");
  struct stat now;
  if (::stat(image.c_str(), &now) != 0 || now.st_dev != mounted.at("image-device").get<dev_t>() ||
      now.st_ino != mounted.at("image-inode").get<ino_t>())
    return fail(ErrorCode::invalid,
                "{} is not the file that is mounted: its own mount covers it, or it was moved; name its backing file "
                "with -o backing_file=,backing_fmt=",
                image);
  IMG_LET(const ImageInfo info, image_info(image, {.read_only = true, .force_share = true}));
  const bool is_backing = mounted.value("ephemeral", false);  // the disk's own layer has no name
  if (!is_backing && !info.backing_filename)
    return fail(ErrorCode::invalid, "{} has no backing file: --sync top would leave nothing out", image);
  request.create.backing_file = std::filesystem::canonical(is_backing ? image : *info.full_backing_filename);
  request.create.backing_format = is_backing ? info.format : info.backing_format;
  request.create.allowed_directories.push_back(directory_of(*request.create.backing_file));
  return {};
}

Result<> make_target(Request& request, const Json& mounted, NewFile& file) {
  if (std::filesystem::exists(request.target) && !request.replace)
    return fail(ErrorCode::invalid, "{} exists: --force replaces it, --no-create writes into it as it is",
                request.target);
  struct stat mount, target;
  const std::string mountpoint = mounted.at("mountpoint");
  if (::stat(mountpoint.c_str(), &mount) == 0 && ::stat(directory_of(request.target).c_str(), &target) == 0 &&
      mount.st_dev == target.st_dev)
    return fail(ErrorCode::invalid, "{} lies in the mount {} itself", request.target, mountpoint);
  if (request.mirror.sync == MirrorSync::top && !request.create.backing_file) IMG_TRY(share_backing(mounted, request));
  request.create.size = mounted.at("virtual-size").get<uint64_t>();
  request.create.durable = false;  // the job flushes it before anything relies on it
  IMG_TRY(create_image(request.target, request.create));
  file.made();
  request.mirror.format = request.create.format;
  request.mirror.target_is_zero = !request.create.backing_file;
  return {};
}

/// The one that is not over.
Result<std::optional<JobStatus>> running_job(control::Client& daemon) {
  IMG_LET(const Json list, daemon.call("jobs"));
  if (list.empty()) return std::nullopt;
  const JobStatus last = control::job_from_json(list.back());
  return is_over(last.state) ? std::nullopt : std::optional(last);
}

/// Asked before the target is made, since that may replace a file.
Result<> check_no_job(control::Client& daemon) {
  IMG_LET(const auto job, running_job(daemon));
  if (!job) return {};
  return fail(ErrorCode::busy, "job {}, a {} to {}, works on this disk: one at a time", job->id, job->kind,
              job->target);
}

Result<> prepare(control::Client& daemon, Request& request, NewFile& created) {
  IMG_TRY(check_no_job(daemon));
  IMG_LET(const Json mounted, daemon.call("info"));
  if (!request.use_existing) IMG_TRY(make_target(request, mounted, created));
  request.mirror.target = std::filesystem::absolute(request.target);
  if (request.complete) request.mirror.when_ready = WhenReady::complete;
  if (request.finish) request.mirror.when_ready = WhenReady::finish;
  return {};
}

Result<uint64_t> running_mirror(control::Client& daemon) {
  IMG_LET(const auto job, running_job(daemon));
  if (job && job->kind == "mirror") return job->id;
  return fail(ErrorCode::not_found, "no mirror of this disk is running");
}

/// Of the mirror that runs already.
Result<> give_order(control::Client& daemon, const Request& request, Io& io) {
  IMG_LET(const uint64_t job, running_mirror(daemon));
  IMG_TRY(daemon.call(fmt::format("job-{}", request.order()), {{"job", job}}));
  if (request.detach) return {};
  const Interruptions interruptions;
  IMG_LET(const JobStatus status,
          watch_job(daemon, job, WatchUntil::over, interruptions, IfInterrupted::leave, io, request.show));
  return request.cancel && status.state == JobState::cancelled ? Result<>() : outcome_of(status);
}

Result<> mirror(Request& request, Io& io) {
  IMG_LET(control::Client daemon, connect_to_daemon(request.mounted));
  if (request.target.empty()) return give_order(daemon, request, io);
  NewFile created(request.target);
  IMG_TRY(prepare(daemon, request, created));
  std::optional<Interruptions> interruptions;
  if (!request.detach) interruptions.emplace();
  IMG_LET(const Json answer, daemon.call(request.kind(), control::to_json(request.mirror)));
  created.keep();
  const auto job = answer.at("job").get<uint64_t>();
  if (!interruptions) {
    io.out << fmt::format("job {}\n", job) << std::flush;
    return {};
  }
  const bool goes_on = request.order() == nullptr && !request.is_backup();
  const WatchUntil until = goes_on ? WatchUntil::ready : WatchUntil::over;
  IMG_LET(const JobStatus status,
          watch_job(daemon, job, until, *interruptions, IfInterrupted::cancel, io, request.show));
  IMG_TRY(outcome_of(status));
  if (goes_on) io.out << fmt::format("job {} is ready\n", job) << std::flush;
  return {};
}

Result<> check(const Request& request) {
  if (int{request.complete} + int{request.finish} + int{request.cancel} > 1)
    return fail(ErrorCode::invalid, "--complete, --finish and --cancel exclude each other");
  if (request.target.empty() && request.order() == nullptr)
    return fail(ErrorCode::invalid, "a target is needed; or --complete, --finish or --cancel for the mirror that runs");
  if (request.cancel && !request.target.empty())
    return fail(ErrorCode::invalid, "--cancel is for the mirror that runs, and takes no target");
  if (request.use_existing && (request.replace || request.has_create_options))
    return fail(ErrorCode::invalid, "--no-create makes no image, so that --force and -o make no sense");
  return {};
}

void add_options(CommandLine& line, Request& request, std::optional<std::string>& format,
                 std::vector<std::string>& lists) {
  line.text("MOUNT", request.mounted, "A mount point, or the image that is mounted").required();
  line.text("-O,--target-format", format, "Format of the target: qcow2 (default), qed, fvd or raw", "FORMAT");
  line.texts("-o", lists, "Options of the target as key=value,...; \"-o help\" lists them");
  line.word("--sync", request.mirror.sync, control::parse_sync,
            request.is_backup() ? "What is copied: full (default) all, top what the image itself holds"
                                : "What is copied: full (default) all, top what the image itself holds, none what "
                                  "changes from now on");
  line.size("--rate", request.mirror.rate, "Copy at most so many bytes per second");
  line.size("--granularity", request.mirror.granularity, "Unit of copying, a power of two (64k)");
  line.size("--buffer", request.mirror.buffer, "Memory for what is on its way (16M)");
  line.number("--in-flight", request.mirror.in_flight, "Operations at a time, 1 to 64 (16)", "COUNT", 1, 64);
  line.word("--on-error", request.mirror.on_error, control::parse_on_error,
            "report (default) fails, stop pauses, enospc pauses if there is no space, ignore tries again");
  line.flag("--force", request.replace, "Replace a target that exists");
  line.flag("-n,--no-create", request.use_existing, "Write into a target that exists and is large enough");
  line.flag("--detach", request.detach, "Leave the job to the daemon, and do not wait");
  add_allow_path_option(line, request.create.allowed_directories);
  add_progress_options(line, request.show);
}

void add_mirror_options(CommandLine& line, Request& request) {
  line.text("TARGET", request.target, "The image to make; without it an order is for the mirror that runs");
  line.flag("--complete", request.complete, "When both are alike the target takes the image's place in the mount");
  line.flag("--finish", request.finish, "When both are alike the target is left as a copy of that instant");
  line.flag("--cancel", request.cancel, "End the mirror that runs; the image stays as it is");
  line.flag("--write-blocking", request.mirror.write_blocking,
            "Writes return when both sides have them, so that it comes to an end however busy the disk is");
}

void add_backup_options(CommandLine& line, Request& request) {
  line.text("TARGET", request.target, "The image to make").required();
  line.text("--incremental", request.mirror.bitmap, "Copy what this bitmap says has changed; it is clear from then on",
            "BITMAP");
}

int run(Io& io, Arguments args, JobKind kind) {
  Request request{.mirror = {.kind = kind}};
  std::optional<std::string> format;
  std::vector<std::string> lists;
  CommandLine line(request.is_backup()
                       ? "Copies a mounted disk as it is now to another image, while it is in use."
                       : "Copies a mounted disk to another image while it is in use, and serves that one if wanted.",
                   fmt::format("imgfuse {}", request.kind()));
  add_options(line, request, format, lists);
  if (request.is_backup())
    add_backup_options(line, request);
  else
    add_mirror_options(line, request);
  if (const auto status = line.parse(io, args)) return *status;
  if (format) request.mirror.format = request.create.format = *format;
  request.has_create_options = !lists.empty();
  if (const auto status = take_create_options(io, line, lists, request.create)) return *status;
  if (auto good = check(request); !good) return line.usage_error(io, good.error());
  if (auto mirrored = mirror(request, io); !mirrored) {
    print_error(io, request.mounted, mirrored.error());
    return kFailure;
  }
  return kSuccess;
}

}  // namespace

int run_mirror(Io& io, Arguments args) { return run(io, args, JobKind::mirror); }
int run_backup(Io& io, Arguments args) { return run(io, args, JobKind::backup); }

}  // namespace imgfuse::tool
