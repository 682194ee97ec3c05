// What is said through a control socket: one JSON object a line. packaging/man/imgfuse-control.7 describes it.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "imgfuse/check.h"
#include "imgfuse/error.h"

namespace imgfuse::control {

using Json = nlohmann::ordered_json;

/// Raised when a client that knows an older one would misunderstand an answer. New commands do not raise it.
inline constexpr int kProtocolVersion = 1;
/// Without the newline.
inline constexpr size_t kMaxRequestLength = size_t{64} << 10;

/// {"command": "snapshot-create", "arguments": {"name": "monday"}, "id": 1}
struct Request {
  std::string command;
  Json arguments = Json::object();
  Json id;  ///< anything; comes back with the answer
};

Result<Request> parse_request(std::string_view line);
/// Lines end with a newline.
std::string format_request(const Request& request);
/// {"return": …, "id": …} or {"error": {"code": "busy", "text": …}, "id": …}
std::string format_answer(const Result<Json>& answer, const Json& id);
Result<Json> parse_answer(std::string_view line);
/// {"event": "closed"}, with an "error" if closing failed. The last line on every connection.
std::string format_closed(const Result<>& closed);
/// What format_closed() said; nothing if the line says something else.
std::optional<Result<>> parse_closed(std::string_view line);

/// The arguments of a command. Each is taken once; finish() then says whether there is one that nobody knows.
class Arguments {
 public:
  explicit Arguments(const Json& arguments) : rest_(arguments) {}

  Result<std::string> text(const char* name);
  Result<uint64_t> number(const char* name);
  Result<uint64_t> number(const char* name, uint64_t otherwise);
  Result<bool> flag(const char* name);  ///< false if it is not there
  Result<std::string> text(const char* name, const char* otherwise);
  Result<> finish() const;

 private:
  std::optional<Json> take(const char* name);
  Json rest_;
};

Json to_json(const Error& error);
Error error_from_json(const Json& json);

/// One line without a newline. Bytes that are no UTF-8, as names in images can have, are replaced.
std::string to_line(const Json& json);
/// The same for people: indented.
std::string to_text(const Json& json);

/// qemu-img's keys. Of "disk-size", which it does not have, snapshot_from_json() knows too.
Json to_json(const SnapshotInfo& snapshot);
SnapshotInfo snapshot_from_json(const Json& json);

}  // namespace imgfuse::control
