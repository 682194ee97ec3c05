#include "text.h"

#include <fmt/format.h>

#include <array>
#include <charconv>
#include <cmath>
#include <optional>
#include <ostream>

namespace imgfuse::tool {
namespace {

constexpr std::string_view kUnits = "KMGTPE";

/// The factor that a suffix such as "G" or "GiB" stands for.
std::optional<uint64_t> unit_factor(std::string_view suffix) {
  if (suffix.empty() || suffix == "B" || suffix == "b") return 1;
  const char letter = suffix.front() == 'k' ? 'K' : suffix.front();
  const size_t unit = kUnits.find(letter);
  const std::string_view rest = suffix.substr(1);
  if (unit == std::string_view::npos || !(rest.empty() || rest == "B" || rest == "iB")) return std::nullopt;
  return uint64_t{1} << (10 * (unit + 1));
}

}  // namespace

Result<uint64_t> parse_size(std::string_view text) {
  const auto bad = [&] { return fail(ErrorCode::invalid, "\"{}\" is not a size such as 512, 64k or 1.5G", text); };
  const auto too_large = [&] { return fail(ErrorCode::invalid, "size {} is larger than 2^63-1 bytes", text); };
  const char* const end = text.data() + text.size();

  uint64_t whole = 0;
  auto [rest, error] = std::from_chars(text.data(), end, whole);
  if (error == std::errc::result_out_of_range) return too_large();
  if (error != std::errc()) return bad();
  double fraction = 0;
  if (rest != end && *rest == '.') {
    double scale = 0.1;
    for (++rest; rest != end && *rest >= '0' && *rest <= '9'; ++rest, scale /= 10) fraction += (*rest - '0') * scale;
  }
  const auto factor = unit_factor({rest, static_cast<size_t>(end - rest)});
  if (!factor || (*factor == 1 && fraction != 0)) return bad();
  if (whole > (uint64_t{INT64_MAX} - *factor + 1) / *factor) return too_large();
  return whole * *factor + static_cast<uint64_t>(fraction * static_cast<double>(*factor));
}

std::string human_size(uint64_t bytes) {
  static constexpr std::array<std::string_view, 7> kNames = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  // 999.5 of a unit would round to four digits: take the next unit, as qemu-img does.
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 999.5 && unit + 1 < kNames.size()) {
    value /= 1024;
    ++unit;
  }
  return fmt::format("{:.3g} {}", value, kNames[unit]);
}

std::string printable(std::string_view text) {
  std::string safe;
  for (const char c : text) safe += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  return safe;
}

void print_error(Io& io, std::string_view subject, const Error& error, std::string_view hint) {
  const std::string& text = error.text();
  const bool named = subject.empty() || text.starts_with(fmt::format("{}: ", subject));
  io.err << (named ? fmt::format("imgfuse: {}\n", text) : fmt::format("imgfuse: {}: {}\n", subject, text));
  if (!hint.empty()) io.err << "hint: " << hint << '\n';
  io.err.flush();
}

void print_warning(Io& io, std::string_view subject, std::string_view text) {
  io.err << fmt::format("imgfuse: {}: warning: {}\n", subject, text) << std::flush;
}

}  // namespace imgfuse::tool
