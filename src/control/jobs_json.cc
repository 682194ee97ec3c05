#include "control/jobs_json.h"

#include <algorithm>
#include <array>
#include <utility>

namespace imgfuse::control {
namespace {

template <class T, size_t n>
using Words = std::array<std::pair<const char*, T>, n>;

constexpr Words<MirrorSync, 3> kSync = {
    {{"full", MirrorSync::full}, {"top", MirrorSync::top}, {"none", MirrorSync::none}}};
constexpr Words<OnError, 4> kOnError = {
    {{"stop", OnError::stop}, {"report", OnError::report}, {"ignore", OnError::ignore}, {"enospc", OnError::enospc}}};
constexpr Words<WhenReady, 3> kWhenReady = {
    {{"wait", WhenReady::wait}, {"complete", WhenReady::complete}, {"finish", WhenReady::finish}}};
constexpr Words<JobState, 8> kStates = {{{"running", JobState::running},
                                         {"ready", JobState::ready},
                                         {"paused", JobState::paused},
                                         {"concluding", JobState::concluding},
                                         {"completed", JobState::completed},
                                         {"finished", JobState::finished},
                                         {"cancelled", JobState::cancelled},
                                         {"failed", JobState::failed}}};

template <class T, size_t n>
const char* word_for(const Words<T, n>& words, T value) {
  for (const auto& [word, candidate] : words)
    if (candidate == value) return word;
  return "";
}

template <class T, size_t n>
Result<T> parse_word(const Words<T, n>& words, const char* what, const std::string& wanted) {
  std::string all;
  for (const auto& [word, value] : words) {
    if (wanted == word) return value;
    all.append(all.empty() ? "" : ", ").append(word);
  }
  return fail(ErrorCode::invalid, "{} \"{}\" is none of {}", what, wanted, all);
}

Result<std::optional<std::string>> take_optional(Arguments& arguments, const char* name) {
  IMG_LET(std::string text, arguments.text(name, ""));
  return text.empty() ? std::nullopt : std::optional(std::move(text));
}

}  // namespace

Result<MirrorSync> parse_sync(const std::string& word) { return parse_word(kSync, "sync", word); }
Result<OnError> parse_on_error(const std::string& word) { return parse_word(kOnError, "on-error", word); }
const char* to_word(JobState state) { return word_for(kStates, state); }

bool is_copy(JobKind kind) { return kind == JobKind::mirror || kind == JobKind::backup; }

Json to_json(const JobOptions& options) {
  Json json = {{"granularity", options.granularity},
               {"buffer", options.buffer},
               {"in-flight", options.in_flight},
               {"rate", options.rate},
               {"on-error", word_for(kOnError, options.on_error)}};
  if (options.base) json["base"] = *options.base;
  if (!is_copy(options.kind)) return json;
  json["target"] = options.target;
  if (options.format) json["format"] = *options.format;
  json["target-is-zero"] = options.target_is_zero;
  json["sync"] = word_for(kSync, options.sync);
  if (options.bitmap) json["bitmap"] = *options.bitmap;
  if (options.kind == JobKind::backup) return json;
  json["write-blocking"] = options.write_blocking;
  json["when-ready"] = word_for(kWhenReady, options.when_ready);
  return json;
}

namespace {

Result<> take_copy_options(Arguments& arguments, JobOptions& options) {
  IMG_LET(options.target, arguments.text("target"));
  IMG_LET(options.format, take_optional(arguments, "format"));
  IMG_LET(options.target_is_zero, arguments.flag("target-is-zero"));
  IMG_LET(const std::string sync, arguments.text("sync", word_for(kSync, options.sync)));
  IMG_LET(options.sync, parse_sync(sync));
  if (options.kind == JobKind::backup) {
    IMG_LET(options.bitmap, take_optional(arguments, "bitmap"));
    return {};
  }
  IMG_LET(options.write_blocking, arguments.flag("write-blocking"));
  IMG_LET(const std::string when_ready, arguments.text("when-ready", word_for(kWhenReady, options.when_ready)));
  IMG_LET(options.when_ready, parse_word(kWhenReady, "when-ready", when_ready));
  return {};
}

}  // namespace

Result<JobOptions> take_job_options(Arguments& arguments, JobKind kind) {
  JobOptions options;
  options.kind = kind;
  if (is_copy(kind)) {
    IMG_TRY(take_copy_options(arguments, options));
  } else {
    IMG_LET(options.base, take_optional(arguments, "base"));
  }
  IMG_LET(options.granularity, arguments.number("granularity", options.granularity));
  IMG_LET(options.buffer, arguments.number("buffer", options.buffer));
  IMG_LET(const uint64_t in_flight, arguments.number("in-flight", options.in_flight));
  options.in_flight = static_cast<unsigned>(std::min<uint64_t>(in_flight, UINT32_MAX));
  IMG_LET(options.rate, arguments.number("rate", options.rate));
  IMG_LET(const std::string on_error, arguments.text("on-error", word_for(kOnError, options.on_error)));
  IMG_LET(options.on_error, parse_on_error(on_error));
  return options;
}

Json to_json(const JobStatus& job) {
  Json json = {
      {"job", job.id},        {"kind", job.kind},           {"target", job.target}, {"state", to_word(job.state)},
      {"copied", job.copied}, {"remaining", job.remaining}, {"rate", job.rate}};
  if (job.error) json["error"] = to_json(*job.error);
  return json;
}

JobStatus job_from_json(const Json& json) {
  JobStatus job;
  if (!json.is_object()) return job;
  Arguments fields(json);
  job.id = fields.number("job", 0).value_or(0);
  job.kind = fields.text("kind", "").value_or("");
  job.target = fields.text("target", "").value_or("");
  job.state = parse_word(kStates, "state", fields.text("state", "").value_or("")).value_or(JobState::failed);
  job.copied = fields.number("copied", 0).value_or(0);
  job.remaining = fields.number("remaining", 0).value_or(0);
  job.rate = fields.number("rate", 0).value_or(0);
  if (const auto error = json.find("error"); error != json.end()) job.error = error_from_json(*error);
  return job;
}

}  // namespace imgfuse::control
