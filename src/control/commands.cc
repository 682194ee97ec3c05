#include "control/commands.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <thread>
#include <utility>

#include "base/math.h"
#include "control/jobs_json.h"
#include "control/statistics_json.h"
#include "imgfuse/background_copy.h"
#include "imgfuse/bitmaps.h"
#include "imgfuse/snapshots.h"

namespace imgfuse::control {
namespace {

/// The kernel tells of a close() after it has returned: who closes a snapshot's file and deletes the snapshot would
/// find it open at times.
constexpr unsigned kDeleteAttempts = 25;
constexpr std::chrono::milliseconds kDeletePause(20);

/// Bounds one answer of changed-since.
constexpr uint64_t kMaxGranules = 32768;

constexpr uint64_t kDefaultGranularity = 65536;

constexpr std::array<std::pair<const char*, Preallocation>, 4> kPreallocations = {{
    {"off", Preallocation::off},
    {"metadata", Preallocation::metadata},
    {"falloc", Preallocation::falloc},
    {"full", Preallocation::full},
}};

Result<Preallocation> parse_preallocation(const std::string& word) {
  for (const auto& [name, mode] : kPreallocations)
    if (word == name) return mode;
  return fail(ErrorCode::invalid, "preallocation is \"{}\"; it can be off, metadata, falloc or full", word);
}

Json describe(const BackgroundCopy::Progress& progress) {
  constexpr std::array kStates = {"waiting", "running", "pausing", "finished", "failed", "off"};
  return {{"state", kStates[static_cast<size_t>(progress.state)]},
          {"done", progress.done},
          {"total", progress.total},
          {"copied-on-read", progress.copied_on_read},
          {"skipped-on-read", progress.skipped_on_read}};
}

Json describe(const SnapshotInfo& snapshot) {
  Json json = to_json(snapshot);
  json["disk-size"] = snapshot.disk_size;
  return json;
}

Json describe(const BitmapInfo& bitmap) {
  return {{"name", bitmap.name},
          {"granularity", bitmap.granularity},
          {"in-use", bitmap.in_use},
          {"auto", bitmap.recording}};
}

}  // namespace

const Commands::Entry* Commands::find(const std::string& name) {
  static constexpr std::array kCommands = {
      Entry{"hello", &Commands::hello},
      Entry{"info", &Commands::info},
      Entry{"statistics", &Commands::statistics},
      Entry{"snapshot-list", &Commands::snapshot_list},
      Entry{"snapshot-create", &Commands::snapshot_create},
      Entry{"snapshot-apply", &Commands::snapshot_apply},
      Entry{"snapshot-delete", &Commands::snapshot_delete},
      Entry{"bitmap-list", &Commands::bitmap_list},
      Entry{"bitmap-add", &Commands::bitmap_add},
      Entry{"bitmap-remove", &Commands::bitmap_remove},
      Entry{"bitmap-clear", &Commands::bitmap_clear},
      Entry{"changed-since", &Commands::changed_since},
      Entry{"resize", &Commands::resize},
      Entry{"mirror", &Commands::start_job<JobKind::mirror>},
      Entry{"backup", &Commands::start_job<JobKind::backup>},
      Entry{"stream", &Commands::start_job<JobKind::stream>},
      Entry{"commit", &Commands::start_job<JobKind::commit>},
      Entry{"jobs", &Commands::list_jobs},
      Entry{"job-pause", &Commands::on_job<&Jobs::pause>},
      Entry{"job-resume", &Commands::on_job<&Jobs::resume>},
      Entry{"job-cancel", &Commands::on_job<&Jobs::cancel>},
      Entry{"job-complete", &Commands::on_job<&Jobs::complete>},
      Entry{"job-finish", &Commands::on_job<&Jobs::finish>},
      Entry{"job-set-rate", &Commands::set_rate},
  };
  const auto* found = std::find_if(kCommands.begin(), kCommands.end(), [&](const Entry& e) { return name == e.name; });
  return found == kCommands.end() ? nullptr : found;
}

Result<Json> Commands::run(const Request& request) {
  const Entry* command = find(request.command);
  if (command == nullptr) return fail(ErrorCode::unsupported, "there is no command \"{}\"", request.command);
  Arguments arguments(request.arguments);
  return (this->*command->run)(arguments);
}

Result<Json> Commands::hello(Arguments& arguments) {
  IMG_TRY(arguments.finish());
  return Json{{"protocol", kProtocolVersion}, {"version", IMGFUSE_VERSION}, {"pid", ::getpid()}};
}

Result<Json> Commands::info(Arguments& arguments) {
  IMG_TRY(arguments.finish());
  const DiskInfo disk = disk_.info();
  Json json = presenter_.describe();
  json["format"] = disk.format;
  json["virtual-size"] = disk.size;
  json["cluster-size"] = disk.cluster_size;
  json["read-only"] = disk.read_only;
  json["snapshots"] = disk_.snapshots() != nullptr;
  json["bitmaps"] = disk_.bitmaps() != nullptr;
  if (const BackgroundCopy* copy = disk_.background_copy()) json["background-copy"] = describe(copy->progress());
  return json;
}

Result<Json> Commands::statistics(Arguments& arguments) {
  IMG_TRY(arguments.finish());
  return to_json(disk_.statistics());
}

Result<Snapshots*> Commands::snapshots() {
  if (Snapshots* snapshots = disk_.snapshots()) return snapshots;
  return fail(ErrorCode::unsupported, "there are no snapshots in {} images", disk_.info().format);
}

Result<Json> Commands::snapshot_list(Arguments& arguments) {
  IMG_TRY(arguments.finish());
  IMG_LET(Snapshots* const snapshots, snapshots());
  IMG_LET(const std::vector<SnapshotInfo> infos, snapshots->list());
  Json list = Json::array();
  for (const SnapshotInfo& snapshot : infos) list.push_back(describe(snapshot));
  return list;
}

Result<Json> Commands::snapshot_create(Arguments& arguments) {
  IMG_LET(const std::string name, arguments.text("name"));
  IMG_TRY(arguments.finish());
  IMG_LET(Snapshots* const snapshots, snapshots());
  IMG_TRY(presenter_.settle());
  IMG_LET(const SnapshotInfo snapshot, snapshots->create(name));
  presenter_.snapshots_changed();
  return describe(snapshot);
}

Result<Json> Commands::snapshot_apply(Arguments& arguments) {
  IMG_LET(const std::string name, arguments.text("snapshot"));
  IMG_TRY(arguments.finish());
  IMG_LET(Snapshots* const snapshots, snapshots());
  IMG_TRY(presenter_.settle());
  IMG_TRY(snapshots->apply(name));
  IMG_TRY(presenter_.replaced());
  return Json::object();
}

Result<Json> Commands::snapshot_delete(Arguments& arguments) {
  IMG_LET(const std::string name, arguments.text("snapshot"));
  IMG_TRY(arguments.finish());
  IMG_LET(Snapshots* const snapshots, snapshots());
  for (unsigned attempt = 1;; ++attempt) {
    const auto removed = snapshots->remove(name);
    if (removed) {
      presenter_.snapshots_changed();
      return Json::object();
    }
    if (removed.error().code() != ErrorCode::busy || attempt == kDeleteAttempts) return fail(removed.error());
    std::this_thread::sleep_for(kDeletePause);
  }
}

Result<Bitmaps*> Commands::bitmaps() {
  if (Bitmaps* bitmaps = disk_.bitmaps()) return bitmaps;
  return fail(ErrorCode::unsupported, "there are no bitmaps in {} images", disk_.info().format);
}

Result<Json> Commands::bitmap_list(Arguments& arguments) {
  IMG_TRY(arguments.finish());
  IMG_LET(Bitmaps* const bitmaps, bitmaps());
  Json list = Json::array();
  for (const BitmapInfo& bitmap : bitmaps->list()) list.push_back(describe(bitmap));
  return list;
}

Result<Json> Commands::bitmap_add(Arguments& arguments) {
  IMG_LET(const std::string name, arguments.text("name"));
  IMG_LET(const uint64_t granularity, arguments.number("granularity", kDefaultGranularity));
  IMG_TRY(arguments.finish());
  IMG_LET(Bitmaps* const bitmaps, bitmaps());
  IMG_TRY(presenter_.settle());
  IMG_TRY(bitmaps->add(name, granularity));
  return Json::object();
}

Result<Json> Commands::bitmap_remove(Arguments& arguments) {
  IMG_LET(const std::string name, arguments.text("name"));
  IMG_TRY(arguments.finish());
  IMG_LET(Bitmaps* const bitmaps, bitmaps());
  IMG_TRY(bitmaps->remove(name));
  return Json::object();
}

Result<Json> Commands::bitmap_clear(Arguments& arguments) {
  IMG_LET(const std::string name, arguments.text("name"));
  IMG_TRY(arguments.finish());
  IMG_LET(Bitmaps* const bitmaps, bitmaps());
  IMG_TRY(presenter_.settle());
  IMG_TRY(bitmaps->clear(name));
  return Json::object();
}

Result<uint64_t> Commands::granularity_of(const std::string& bitmap) {
  IMG_LET(Bitmaps* const bitmaps, bitmaps());
  for (const BitmapInfo& info : bitmaps->list())
    if (info.name == bitmap) return std::max<uint64_t>(info.granularity, 512);
  return fail(ErrorCode::not_found, "there is no bitmap \"{}\"", bitmap);
}

/// A part of the disk at a time: `end` says how far the answer goes.
Result<Json> Commands::changed_since(Arguments& arguments) {
  IMG_LET(const std::string name, arguments.text("name"));
  IMG_LET(const uint64_t start, arguments.number("start", 0));
  IMG_TRY(arguments.finish());
  IMG_LET(const uint64_t granularity, granularity_of(name));
  const uint64_t size = disk_.size();
  if (start > size) return fail(ErrorCode::invalid, "start {} is behind the end of the disk ({})", start, size);
  const uint64_t length = std::min(size - start, granularity * kMaxGranules);
  if (start == 0) IMG_TRY(presenter_.settle());
  Json ranges = Json::array();
  if (length > 0) {
    IMG_LET(const auto changed, disk_.bitmaps()->changed(name, {GuestOffset(start), length}));
    for (const GuestRange& range : changed)
      ranges.push_back({{"start", range.begin.bytes()}, {"length", range.length}});
  }
  return Json{{"ranges", std::move(ranges)}, {"end", start + length}, {"virtual-size", size}};
}

Result<Json> Commands::resize(Arguments& arguments) {
  IMG_LET(const uint64_t size, arguments.number("size"));
  ResizeOptions options;
  IMG_LET(options.shrink, arguments.flag("shrink"));
  IMG_LET(const std::string preallocation, arguments.text("preallocation", "off"));
  IMG_TRY(arguments.finish());
  IMG_LET(options.preallocation, parse_preallocation(preallocation));
  IMG_TRY(presenter_.settle());
  IMG_TRY(disk_.resize(size, options));
  IMG_TRY(presenter_.resized());
  return Json{{"virtual-size", disk_.size()}};
}

Result<Jobs*> Commands::jobs() {
  if (Jobs* jobs = disk_.jobs()) return jobs;
  return fail(ErrorCode::unsupported, "a job needs a disk that is mounted");
}

template <JobKind kind>
Result<Json> Commands::start_job(Arguments& arguments) {
  IMG_LET(const JobOptions options, take_job_options(arguments, kind));
  IMG_TRY(arguments.finish());
  IMG_LET(Jobs* const jobs, jobs());
  if (is_copy(kind) && !options.target.starts_with('/'))
    return fail(ErrorCode::invalid, "target \"{}\" is not an absolute path", options.target);
  IMG_LET(const uint64_t job, jobs->start(options));
  return Json{{"job", job}};
}

Result<Json> Commands::list_jobs(Arguments& arguments) {
  IMG_TRY(arguments.finish());
  IMG_LET(Jobs* const jobs, jobs());
  Json list = Json::array();
  for (const JobStatus& job : jobs->list()) list.push_back(to_json(job));
  return list;
}

template <Result<> (Jobs::*action)(uint64_t)>
Result<Json> Commands::on_job(Arguments& arguments) {
  IMG_LET(const uint64_t job, arguments.number("job"));
  IMG_TRY(arguments.finish());
  IMG_LET(Jobs* const jobs, jobs());
  IMG_TRY((jobs->*action)(job));
  return Json::object();
}

Result<Json> Commands::set_rate(Arguments& arguments) {
  IMG_LET(const uint64_t job, arguments.number("job"));
  IMG_LET(const uint64_t rate, arguments.number("rate"));
  IMG_TRY(arguments.finish());
  IMG_LET(Jobs* const jobs, jobs());
  IMG_TRY(jobs->set_rate(job, rate));
  return Json::object();
}

}  // namespace imgfuse::control
