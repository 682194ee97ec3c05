#include "control/protocol.h"

#include <array>
#include <utility>

namespace imgfuse::control {
namespace {

constexpr uint64_t kNanoseconds = 1'000'000'000;

constexpr std::array<std::pair<ErrorCode, const char*>, 9> kCodes = {{
    {ErrorCode::io, "io"},
    {ErrorCode::no_space, "no-space"},
    {ErrorCode::corrupt, "corrupt"},
    {ErrorCode::unsupported, "unsupported"},
    {ErrorCode::invalid, "invalid"},
    {ErrorCode::denied, "denied"},
    {ErrorCode::read_only, "read-only"},
    {ErrorCode::not_found, "not-found"},
    {ErrorCode::busy, "busy"},
}};

std::string text_of(const Json& json, const char* name) {
  const auto found = json.find(name);
  return found != json.end() && found->is_string() ? found->get<std::string>() : std::string();
}

uint64_t number_of(const Json& json, const char* name) {
  const auto found = json.find(name);
  return found != json.end() && found->is_number_unsigned() ? found->get<uint64_t>() : 0;
}

/// Null unless the line is one JSON object. What is nested deeper than any message is left out, since copying and
/// writing such values recurse.
Json parse_object(std::string_view line) {
  constexpr int kMaxDepth = 8;
  const auto keep = [](int depth, Json::parse_event_t, Json&) { return depth <= kMaxDepth; };
  Json json = Json::parse(line, keep, /*allow_exceptions=*/false);
  if (!json.is_object()) return {};
  return json;
}

}  // namespace

Json to_json(const Error& error) {
  const char* word = "io";
  for (const auto& [code, name] : kCodes)
    if (code == error.code()) word = name;
  return {{"code", word}, {"text", error.text()}};
}

Error error_from_json(const Json& json) {
  const std::string word = json.is_object() ? text_of(json, "code") : "";
  ErrorCode code = ErrorCode::io;
  for (const auto& [candidate, name] : kCodes)
    if (word == name) code = candidate;
  return Error(code, json.is_object() ? text_of(json, "text") : "the daemon reports an error without a text");
}

std::string to_line(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

std::string to_text(const Json& json) { return json.dump(4, ' ', false, Json::error_handler_t::replace); }

Result<Request> parse_request(std::string_view line) {
  const Json json = parse_object(line);
  if (json.is_null()) return fail(ErrorCode::invalid, "a line that is not a JSON object");
  Request request;
  for (const auto& [key, value] : json.items()) {
    if (key == "id") {
      request.id = value;
    } else if (key == "command" && value.is_string()) {
      request.command = value.get<std::string>();
    } else if (key == "arguments" && value.is_object()) {
      request.arguments = value;
    } else {
      return fail(ErrorCode::invalid, "\"{}\" is none of command, arguments and id, or of the wrong type", key);
    }
  }
  if (request.command.empty()) return fail(ErrorCode::invalid, "a request without a command");
  return request;
}

std::string format_request(const Request& request) {
  Json json = {{"command", request.command}, {"arguments", request.arguments}};
  if (!request.id.is_null()) json["id"] = request.id;
  return to_line(json) + "\n";
}

std::string format_answer(const Result<Json>& answer, const Json& id) {
  Json json = Json::object();
  if (answer)
    json["return"] = *answer;
  else
    json["error"] = to_json(answer.error());
  if (!id.is_null()) json["id"] = id;
  return to_line(json) + "\n";
}

Result<Json> parse_answer(std::string_view line) {
  const Json json = parse_object(line);
  if (const auto error = json.find("error"); error != json.end()) return fail(error_from_json(*error));
  if (const auto value = json.find("return"); value != json.end()) return *value;
  return fail(ErrorCode::invalid, "the daemon's answer makes no sense: {}", line.substr(0, 100));
}

std::string format_closed(const Result<>& closed) {
  Json json = {{"event", "closed"}};
  if (!closed) json["error"] = to_json(closed.error());
  return to_line(json) + "\n";
}

std::optional<Result<>> parse_closed(std::string_view line) {
  const Json json = parse_object(line);
  if (json.is_null() || text_of(json, "event") != "closed") return std::nullopt;
  if (const auto error = json.find("error"); error != json.end()) return fail(error_from_json(*error));
  return Result<>();
}

std::optional<Json> Arguments::take(const char* name) {
  const auto found = rest_.find(name);
  if (found == rest_.end()) return std::nullopt;
  Json value = *found;
  rest_.erase(found);
  return value;
}

Result<std::string> Arguments::text(const char* name, const char* otherwise) {
  const auto value = take(name);
  if (!value) return otherwise;
  if (!value->is_string()) return fail(ErrorCode::invalid, "argument \"{}\" is not a text", name);
  return value->get<std::string>();
}

Result<std::string> Arguments::text(const char* name) {
  IMG_LET(std::string value, text(name, ""));
  if (value.empty()) return fail(ErrorCode::invalid, "argument \"{}\" is missing or empty", name);
  if (value.find('\0') != std::string::npos)
    return fail(ErrorCode::invalid, "argument \"{}\" contains a zero byte", name);
  return value;
}

Result<uint64_t> Arguments::number(const char* name, uint64_t otherwise) {
  const auto value = take(name);
  if (!value) return otherwise;
  const bool is_natural = value->is_number_unsigned() || (value->is_number_integer() && value->get<int64_t>() >= 0);
  if (!is_natural) return fail(ErrorCode::invalid, "argument \"{}\" is not a whole number of at least 0", name);
  return value->get<uint64_t>();
}

Result<uint64_t> Arguments::number(const char* name) {
  if (!rest_.contains(name)) return fail(ErrorCode::invalid, "argument \"{}\" is missing", name);
  return number(name, 0);
}

Result<bool> Arguments::flag(const char* name) {
  const auto value = take(name);
  if (!value) return false;
  if (!value->is_boolean()) return fail(ErrorCode::invalid, "argument \"{}\" is neither true nor false", name);
  return value->get<bool>();
}

Result<> Arguments::finish() const {
  if (rest_.empty()) return {};
  return fail(ErrorCode::invalid, "there is no argument \"{}\"", rest_.begin().key());
}

Json to_json(const SnapshotInfo& snapshot) {
  Json json = {{"id", snapshot.id},
               {"name", snapshot.name},
               {"vm-state-size", snapshot.vm_state_size},
               {"date-sec", snapshot.date_sec},
               {"date-nsec", snapshot.date_nsec},
               {"vm-clock-sec", snapshot.vm_clock_nsec / kNanoseconds},
               {"vm-clock-nsec", snapshot.vm_clock_nsec % kNanoseconds}};
  if (snapshot.icount) json["icount"] = *snapshot.icount;
  return json;
}

SnapshotInfo snapshot_from_json(const Json& json) {
  SnapshotInfo snapshot;
  if (!json.is_object()) return snapshot;
  snapshot.id = text_of(json, "id");
  snapshot.name = text_of(json, "name");
  snapshot.vm_state_size = number_of(json, "vm-state-size");
  snapshot.disk_size = number_of(json, "disk-size");
  snapshot.date_sec = static_cast<uint32_t>(number_of(json, "date-sec"));
  snapshot.date_nsec = static_cast<uint32_t>(number_of(json, "date-nsec"));
  snapshot.vm_clock_nsec = number_of(json, "vm-clock-sec") * kNanoseconds + number_of(json, "vm-clock-nsec");
  if (json.contains("icount")) snapshot.icount = number_of(json, "icount");
  return snapshot;
}

}  // namespace imgfuse::control
