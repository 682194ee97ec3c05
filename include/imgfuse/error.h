// Errors are values. Functions that can fail return Result<T>; nothing in imgfuse throws.
#pragma once

#include <fmt/core.h>

#include <string>
#include <string_view>
#include <tl/expected.hpp>
#include <utility>

namespace imgfuse {

/// What a caller may want to act on. The text of the Error says the rest.
enum class ErrorCode {
  io,           ///< the host failed to read, write or flush
  no_space,     ///< the host or the image has no room; nothing was changed
  corrupt,      ///< the image contradicts its format
  unsupported,  ///< a valid image or request that imgfuse does not implement
  invalid,      ///< the caller asked for something that makes no sense
  denied,       ///< permissions, or the path policy
  read_only,    ///< a change was asked of something read-only
  not_found,    ///< a file or a name does not exist
  busy,         ///< somebody else has it locked
  would_wait,   ///< the caller did not want to wait for a disk (base/no_wait.h)
};

/// One failure, in words for somebody with a broken image at night: what was found, where, what was expected.
class [[nodiscard]] Error {
 public:
  Error(ErrorCode code, std::string text) : code_(code), text_(std::move(text)) {}

  ErrorCode code() const { return code_; }
  const std::string& text() const { return text_; }

  /// The same error with what was being done in front: "open a.qcow2: no such file".
  template <class... Args>
  Error during(fmt::format_string<Args...> format, Args&&... args) const {
    return Error(code_, fmt::format(format, std::forward<Args>(args)...) + ": " + text_);
  }

 private:
  ErrorCode code_;
  std::string text_;
};

template <class T = void>
using Result = tl::expected<T, Error>;

/// An Error ready to be returned from a function whose result is some Result<T>.
template <class... Args>
tl::unexpected<Error> fail(ErrorCode code, fmt::format_string<Args...> format, Args&&... args) {
  return tl::unexpected<Error>(Error(code, fmt::format(format, std::forward<Args>(args)...)));
}

inline tl::unexpected<Error> fail(Error error) { return tl::unexpected<Error>(std::move(error)); }

}  // namespace imgfuse

#define IMG_CONCAT_(a, b) a##b
#define IMG_CONCAT(a, b) IMG_CONCAT_(a, b)

/// Evaluates a Result; returns its error from the enclosing function if there is one.
#define IMG_TRY(...)                                                                                         \
  do {                                                                                                       \
    if (auto img_result = (__VA_ARGS__); !img_result) return ::imgfuse::fail(std::move(img_result).error()); \
  } while (false)

/// Names the value of a Result, or returns its error from the enclosing function:
/// `IMG_LET(auto table, load(offset));`
#define IMG_LET(declaration, ...) IMG_LET_(IMG_CONCAT(img_result_, __COUNTER__), declaration, __VA_ARGS__)
#define IMG_LET_(name, declaration, ...)                      \
  auto name = (__VA_ARGS__);                                  \
  if (!name) return ::imgfuse::fail(std::move(name).error()); \
  declaration = std::move(*name)
