// What a check has found so far.
#pragma once

#include <fmt/core.h>

#include <cstdint>
#include <utility>

#include "imgfuse/check.h"

namespace imgfuse {

/// Counts findings into a report and tells the first of them to a sink, one line each: an image may have millions.
class Findings {
 public:
  static constexpr uint64_t kMaxLines = 10000;

  Findings(CheckReport& report, const CheckSink& sink) : report_(report), sink_(sink) {}

  template <class... Args>
  void corruption(uint64_t times, fmt::format_string<Args...> format, Args&&... args) {
    report_.corruptions += times;
    tell(format, std::forward<Args>(args)...);
  }
  template <class... Args>
  void leak(fmt::format_string<Args...> format, Args&&... args) {
    ++report_.leaks;
    tell(format, std::forward<Args>(args)...);
  }
  template <class... Args>
  void error(fmt::format_string<Args...> format, Args&&... args) {
    ++report_.check_errors;
    tell(format, std::forward<Args>(args)...);
  }

  CheckReport& report() { return report_; }

 private:
  template <class... Args>
  void tell(fmt::format_string<Args...> format, Args&&... args) {
    if (!sink_ || lines_ > kMaxLines) return;
    if (++lines_ > kMaxLines) return sink_(fmt::format("more than {} findings; the rest is counted only", kMaxLines));
    sink_(fmt::format(format, std::forward<Args>(args)...));
  }

  CheckReport& report_;
  const CheckSink& sink_;
  uint64_t lines_ = 0;
};

}  // namespace imgfuse
