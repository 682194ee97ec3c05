// What a subcommand works on: an image that it opens, or the daemon that has it open.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <variant>

#include "control/client.h"
#include "imgfuse/open.h"

namespace imgfuse::tool {

/// The daemon that serves what is mounted at `path`, or that has the image at `path` open.
Result<control::Client> connect_to_daemon(const std::string& path);

/// Runs the commands of control/commands.h, wherever the image is open. An image that is opened here is closed in any
/// case; close() tells how that went.
class Target {
 public:
  /// `path` is a mount point, or an image. An image that is in use is looked for among the mounts of this user.
  static Result<Target> open(const std::string& path, const OpenOptions& options);

  Target(Target&&) = default;
  Target& operator=(Target&&) = delete;
  ~Target();

  Result<control::Json> run(const std::string& command, const control::Json& arguments = control::Json::object());
  Result<> close();

 private:
  using Where = std::variant<control::Client, std::unique_ptr<Disk>>;
  explicit Target(Where where) : where_(std::move(where)) {}

  Where where_;  // no disk: it has been closed
};

}  // namespace imgfuse::tool
