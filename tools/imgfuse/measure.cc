// imgfuse measure: how much space would a new image take?
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "command_line.h"
#include "create_options.h"
#include "imgfuse/job.h"
#include "open_disk.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

Result<Measurement> measure_image(const std::string& image, const OpenOptions& options, const CreateOptions& target) {
  if (image.empty()) return measure(nullptr, target);
  IMG_LET(OpenDisk disk, OpenDisk::open(image, options));
  IMG_LET(const Measurement measurement, measure(&*disk, target));
  IMG_TRY(disk.close());
  return measurement;
}

void print(std::ostream& out, const Measurement& measurement, bool json) {
  if (json) {
    nlohmann::ordered_json object = {{"required", measurement.required},
                                     {"fully-allocated", measurement.fully_allocated}};
    if (measurement.bitmaps) object["bitmaps"] = *measurement.bitmaps;
    out << object.dump(4) << "\n";
    return;
  }
  out << fmt::format("required size: {}\nfully allocated size: {}\n", measurement.required,
                     measurement.fully_allocated);
  if (measurement.bitmaps) out << fmt::format("bitmaps size: {}\n", *measurement.bitmaps);
}

}  // namespace

int run_measure(Io& io, Arguments args) {
  std::string image;
  OpenOptions options{.read_only = true};
  CreateOptions target{.format = "raw"};
  std::vector<std::string> lists;
  std::optional<std::string> size;
  bool json = false;
  CommandLine line("Says how many bytes a new image would take on the host, for what IMAGE holds or for a SIZE.",
                   "imgfuse measure");
  line.text("IMAGE", image);
  line.text("-O,--target-format", target.format, "Format of the new image: raw (default), qcow2, qed or fvd", "FORMAT");
  line.texts("-o", lists, "Options of the new image as key=value,...; \"-o help\" lists them");
  line.text("--size", size, "Virtual size, instead of IMAGE", "SIZE");
  add_snapshot_option(line, options.snapshot);
  add_open_options(line, options);
  add_json_option(line, json);
  if (const auto status = line.parse(io, args)) return *status;

  if (const auto status = take_create_options(io, line, lists, target)) return *status;
  if (size) {
    if (auto set = set_create_option(target, "size", *size); !set) return line.usage_error(io, set.error());
  }
  if (image.empty() != size.has_value())
    return line.usage_error(io, Error(ErrorCode::invalid, "either an image or --size is needed, and not both"));

  const auto measurement = measure_image(image, options, target);
  if (!measurement) {
    print_error(io, image, measurement.error());
    return kFailure;
  }
  print(io.out, *measurement, json);
  io.out << std::flush;
  return kSuccess;
}

}  // namespace imgfuse::tool
