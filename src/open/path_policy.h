// Which files an image may name, and what their names mean.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/unique_fd.h"
#include "imgfuse/error.h"

namespace imgfuse {

/// The path of a file that the image at `naming_path` names: relative names start at the naming image's directory, as
/// that was named. Only text: nothing is looked up.
std::string resolve_name(std::string_view naming_path, std::string_view name);

/// For messages: names come from hostile files and go to terminals.
std::string printable(std::string_view name);

/// Images are data from strangers: one could name /etc/shadow as its backing file, or a device that does something when
/// it is opened. A file may be opened if it lies below the directory of the image that the user named or below a
/// directory that the user allowed; judged by where it really is, after all links and `..`. Names are paths and nothing
/// else: what looks like a protocol (`nbd:`, `json:`, `file:`) is refused.
///
/// RESOLVE_BENEATH would do for plain relative names, but absolute names and `..` that stay inside are legal too. So
/// there is one mechanism for all: take hold of the file without opening it (O_PATH), ask the kernel what it is,
/// decide, and open what is held.
class PathPolicy {
 public:
  static Result<PathPolicy> create(const std::string& image_path, const std::vector<std::string>& allowed_directories);

  enum class Access { read, write };
  /// Opens the file that the image at `naming_path` names. Errors do not name the file.
  Result<UniqueFd> open(const std::string& name, const std::string& naming_path, Access access = Access::read) const;
  /// Makes it, empty, in a directory where it may be, and opens it for writing. Null if something has that name.
  Result<std::optional<UniqueFd>> make(const std::string& name, const std::string& naming_path) const;

 private:
  explicit PathPolicy(std::vector<std::string> directories) : directories_(std::move(directories)) {}

  bool allows(const std::string& canonical_path) const;
  Result<> check_place(const std::string& canonical_path, const std::string& directory) const;

  std::vector<std::string> directories_;  // canonical
};

}  // namespace imgfuse
