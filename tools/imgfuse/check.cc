// imgfuse check: is an image whole, and if not, repair it.
#include <fmt/format.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "command_line.h"
#include "imgfuse/check.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

// qemu-img's exit statuses.
constexpr int kCorruptionsLeft = 2;
constexpr int kLeaksLeft = 3;
constexpr int kNoCheckForFormat = 63;

int status_of(const CheckReport& report) {
  if (report.check_errors > 0) return kFailure;
  if (report.corruptions > 0) return kCorruptionsLeft;
  return report.leaks > 0 ? kLeaksLeft : kSuccess;
}

/// qemu-img's keys; counts that are zero are left out, as there.
nlohmann::ordered_json to_json(const std::string& image, const std::string& format, const CheckReport& report) {
  nlohmann::ordered_json json = {{"image-end-offset", report.image_end_offset}};
  const auto add = [&](const char* key, uint64_t count) {
    if (count > 0) json[key] = count;
  };
  add("total-clusters", report.total_clusters);
  json["check-errors"] = report.check_errors;
  add("corruptions", report.corruptions);
  add("leaks", report.leaks);
  add("corruptions-fixed", report.corruptions_fixed);
  add("leaks-fixed", report.leaks_fixed);
  add("allocated-clusters", report.allocated_clusters);
  add("fragmented-clusters", report.fragmented_clusters);
  add("compressed-clusters", report.compressed_clusters);
  json["filename"] = image;
  json["format"] = format;
  return json;
}

void print(std::ostream& out, const CheckReport& report) {
  if (report.corruptions_fixed + report.leaks_fixed > 0)
    out << fmt::format("Repaired: {} leaked clusters, {} corruptions.\n", report.leaks_fixed, report.corruptions_fixed);
  if (report.clean()) {
    out << "No errors were found on the image.\n";
  } else {
    if (report.corruptions > 0)
      out << fmt::format(
          "{} corruptions: data may be wrong, and writing may make it worse. --repair all may mend them.\n",
          report.corruptions);
    if (report.leaks > 0)
      out << fmt::format("{} leaked clusters: space is wasted, no data is harmed. --repair leaks returns them.\n",
                         report.leaks);
    if (report.check_errors > 0) out << fmt::format("{} errors while checking.\n", report.check_errors);
  }
  if (report.total_clusters > 0)
    out << fmt::format(
        "{} of {} clusters allocated ({:.1f}%), {} fragmented, {} compressed\n", report.allocated_clusters,
        report.total_clusters,
        100.0 * static_cast<double>(report.allocated_clusters) / static_cast<double>(report.total_clusters),
        report.fragmented_clusters, report.compressed_clusters);
  out << fmt::format("Image end offset: {}\n", report.image_end_offset);
}

int undo(Io& io, const std::string& image, const OpenOptions& options, const std::string& file, bool json) {
  const auto report = undo_repair(image, options, file);
  if (!report) {
    print_error(io, image, report.error());
    return kFailure;
  }
  if (json) {
    const nlohmann::ordered_json done = {{"filename", image},
                                         {"undo-file", file},
                                         {"pieces-restored", report->pieces},
                                         {"bytes-restored", report->bytes},
                                         {"image-size", report->size}};
    io.out << done.dump(4) << "\n";
  } else {
    io.out << fmt::format("Put back {} bytes in {} places; the image has {} bytes, as before the repair.\n",
                          report->bytes, report->pieces, report->size);
  }
  io.out << std::flush;
  return kSuccess;
}

Result<Repair> parse_repair(const std::string& word) {
  if (word == "leaks") return Repair::leaks;
  if (word == "all") return Repair::all;
  return fail(ErrorCode::invalid, "\"{}\" is neither leaks nor all", word);
}

}  // namespace

int run_check(Io& io, Arguments args) {
  std::string image;
  OpenOptions options{.read_only = true};
  Repair repair = Repair::none;
  std::optional<std::string> undo_file;
  std::string undo_from;
  bool json = false;
  CommandLine line(
      "Checks an image and, if asked to, repairs it. Exit status: 0 whole or repaired, 1 could not be checked, "
      "2 corruptions, 3 leaks only, 63 the format has no check.",
      "imgfuse check");
  line.text("IMAGE", image).required();
  const auto repair_option = line.word("-r,--repair", repair, parse_repair, "Repair leaks, or all");
  line.text("--undo-file", undo_file, "Keep in this new file what the repair overwrites", "FILE").needs(repair_option);
  line.text("--undo", undo_from, "Take back the repair that made this undo file", "FILE").excludes(repair_option);
  add_open_options(line, options);
  add_json_option(line, json);
  if (const auto status = line.parse(io, args)) return *status;

  if (!undo_from.empty()) {
    options.read_only = false;
    return undo(io, image, options, undo_from, json);
  }
  options.read_only = repair == Repair::none;
  const auto format = options.format
                          ? Result<std::string>(*options.format)
                          : image_info(image, options).map([](const ImageInfo& info) { return info.format; });
  const auto report = check_image(
      image, options, repair, [&](const std::string& finding) { (json ? io.err : io.out) << finding << "\n"; },
      undo_file);
  if (!report) {
    print_error(io, image, report.error());
    return report.error().code() == ErrorCode::unsupported ? kNoCheckForFormat : kFailure;
  }
  const bool can_undo = undo_file && std::filesystem::exists(*undo_file);  // not when nothing was changed
  if (json) {
    auto object = to_json(image, format.value_or("qcow2"), *report);
    if (can_undo) object["undo-file"] = *undo_file;
    io.out << object.dump(4) << "\n";
  } else {
    print(io.out, *report);
    if (can_undo) io.out << fmt::format("To take it back: imgfuse check --undo {} {}\n", *undo_file, image);
  }
  io.out << std::flush;
  return status_of(*report);
}

}  // namespace imgfuse::tool
