// imgfuse compare: do two images hold the same disk?
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "command_line.h"
#include "imgfuse/job.h"
#include "imgfuse/open.h"
#include "progress.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

// qemu-img's exit statuses.
constexpr int kDifferent = 1;
constexpr int kNotOpened = 2;
constexpr int kNotMapped = 3;
constexpr int kNotRead = 4;

int status_of(Verdict verdict) {
  switch (verdict) {
    case Verdict::same:
      return kSuccess;
    case Verdict::content_differs:
    case Verdict::allocation_differs:
    case Verdict::size_differs:
      return kDifferent;
    case Verdict::map_failed:
      return kNotMapped;
    case Verdict::read_failed:
      return kNotRead;
  }
  return kNotRead;
}

/// As qemu-img does, the sector in which the first differing byte lies.
uint64_t sector_of(uint64_t offset) { return offset - offset % 512; }

std::string text_of(const Comparison& comparison) {
  switch (comparison.verdict) {
    case Verdict::same:
      return "Images are identical.\n";
    case Verdict::content_differs:
      return fmt::format("Content mismatch at offset {}!\n", sector_of(comparison.offset));
    case Verdict::allocation_differs:
      return fmt::format("Strict mode: Offset {} block status mismatch!\n", comparison.offset);
    case Verdict::size_differs:
      return "Strict mode: Image size mismatch!\n";
    case Verdict::map_failed:
    case Verdict::read_failed:
      break;
  }
  return {};
}

nlohmann::ordered_json json_of(const Comparison& comparison) {
  nlohmann::ordered_json json = {{"identical", comparison.verdict == Verdict::same},
                                 {"sizes-differ", comparison.sizes_differ}};
  if (comparison.verdict == Verdict::content_differs) {
    json["difference"] = "content";
    json["offset"] = sector_of(comparison.offset);
  } else if (comparison.verdict == Verdict::allocation_differs) {
    json["difference"] = "allocation";
    json["offset"] = comparison.offset;
  } else if (comparison.verdict == Verdict::size_differs) {
    json["difference"] = "size";
  }
  return json;
}

}  // namespace

int run_compare(Io& io, Arguments args) {
  std::string first, second;
  OpenOptions options{.read_only = true};
  std::optional<std::string> first_format, second_format;
  CompareOptions compare_options;
  bool json = false;
  ShowProgress show = ShowProgress::on_terminal;
  CommandLine line(
      "Says whether two images hold the same disk. Exit status: 0 the same, 1 different, 2 an image could not be "
      "opened, 3 its map or 4 its data could not be read.",
      "imgfuse compare");
  line.text("IMAGE1", first).required();
  line.text("IMAGE2", second).required();
  line.text("-f,--format", first_format, "Format of IMAGE1; found out from the image if not given", "FORMAT");
  line.text("-F,--second-format", second_format, "Format of IMAGE2", "FORMAT");
  line.flag("-s,--strict", compare_options.strict, "Sizes and what is allocated must be the same too");
  line.word("-T,--cache", options.cache, parse_cache_mode, "How the files are read: writeback (default) or none",
            "MODE");
  add_allow_path_option(line, options.allowed_directories);
  line.flag("-U,--force-share", options.force_share, "Take no locks: read an image that somebody else writes");
  add_progress_options(line, show, "Say nothing: the exit status tells");
  add_json_option(line, json);
  if (const auto status = line.parse(io, args)) return *status;

  options.format = first_format;
  const auto a = open_disk(first, options);
  if (!a) {
    print_error(io, first, a.error());
    return kNotOpened;
  }
  options.format = second_format;
  const auto b = open_disk(second, options);
  if (!b) {
    print_error(io, second, b.error());
    return kNotOpened;
  }
  const Comparison comparison = [&] {
    ProgressBar bar(io, show);
    return compare(**a, **b, compare_options, bar.all());
  }();
  (void)(*a)->close();  // read-only: nothing can get lost
  (void)(*b)->close();

  if (comparison.error) {
    print_error(io, "", comparison.error->during("compare {} and {}", first, second));
  } else if (json) {
    io.out << json_of(comparison).dump(4) << "\n";
  } else if (show != ShowProgress::never) {
    if (comparison.sizes_differ && !compare_options.strict) io.out << "Warning: Image size mismatch!\n";
    io.out << text_of(comparison);
  }
  io.out << std::flush;
  return status_of(comparison.verdict);
}

}  // namespace imgfuse::tool
