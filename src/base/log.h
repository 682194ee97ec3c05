// What the daemon has to say while nobody is waiting for an answer: warnings and errors, one line each.
#pragma once

#include <fmt/core.h>

#include <functional>
#include <string>
#include <string_view>

namespace imgfuse {

enum class LogLevel { warning, error };

/// Where lines go; stderr with "imgfuse: " in front until set. Set it before any thread starts.
using LogSink = std::function<void(LogLevel, const std::string& line)>;
void set_log_sink(LogSink sink);
void log_line(LogLevel level, const std::string& line);

template <class... Args>
void log_warning(fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::warning, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void log_error(fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::error, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace imgfuse
