#include "base/log.h"

#include <cstdio>

namespace imgfuse {
namespace {

LogSink& sink() {
  static LogSink current = [](LogLevel level, const std::string& line) {
    fmt::print(stderr, "imgfuse: {}{}\n", level == LogLevel::warning ? "warning: " : "", line);
  };
  return current;
}

}  // namespace

void set_log_sink(LogSink new_sink) { sink() = std::move(new_sink); }

void log_line(LogLevel level, const std::string& line) { sink()(level, line); }

}  // namespace imgfuse
