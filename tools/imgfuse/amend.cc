// imgfuse amend: change the options of an image that exists.
#include "imgfuse/amend.h"

#include <array>
#include <cstdint>
#include <string_view>

#include "command_line.h"
#include "create_options.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

constexpr const char* kAmendOptionList =
    "Options for -o, as qemu-img names them:\n"
    "  compat=0.10|1.1      qcow2 version 2 or 3\n"
    "  lazy_refcounts=on    allow reference counts to be postponed\n"
    "  backing_fmt=FORMAT   format of the backing file\n"
    "  data_file_raw=off    the data file alone no longer equals the disk\n"
    "and for FVD images, with numbers as the format has them:\n"
    "  copy_on_read=on|off need_zero_init=on|off clean_shutdown=on|off\n"
    "  max_outstanding_copy_on_read_data=BYTES prefetch_start_delay=SECONDS num_prefetch_slots=N\n"
    "  bytes_per_prefetch=BYTES prefetch_read_throughput_measure_time=MS\n"
    "  prefetch_write_throughput_measure_time=MS prefetch_perf_calc_alpha=PERCENT\n"
    "  prefetch_min_read_throughput_threshold=KIB/S prefetch_min_write_throughput_threshold=KIB/S\n"
    "  prefetch_over_threshold_throttle_time=MS data_file=FILE data_file_fmt=FORMAT\n";

/// An option of FVD; false if it is none.
Result<bool> set_fvd_option(FvdSettings& fvd, const std::string& key, const std::string& value) {
  struct Switch {
    std::string_view key;
    std::optional<bool> FvdSettings::*field;
  };
  struct Size {
    std::string_view key;
    std::optional<uint32_t> FvdSettings::*field;
  };
  struct Number {
    std::string_view key;
    std::optional<int32_t> FvdSettings::*field;
  };
  static constexpr std::array kSwitches = {Switch{"copy_on_read", &FvdSettings::copy_on_read},
                                           Switch{"need_zero_init", &FvdSettings::need_zero_init},
                                           Switch{"clean_shutdown", &FvdSettings::clean_shutdown}};
  static constexpr std::array kSizes = {
      Size{"num_prefetch_slots", &FvdSettings::num_prefetch_slots},
      Size{"bytes_per_prefetch", &FvdSettings::bytes_per_prefetch},
      Size{"prefetch_read_throughput_measure_time", &FvdSettings::prefetch_read_throughput_measure_time},
      Size{"prefetch_write_throughput_measure_time", &FvdSettings::prefetch_write_throughput_measure_time},
      Size{"prefetch_perf_calc_alpha", &FvdSettings::prefetch_perf_calc_alpha},
      Size{"prefetch_min_read_throughput_threshold", &FvdSettings::prefetch_min_read_throughput},
      Size{"prefetch_min_write_throughput_threshold", &FvdSettings::prefetch_min_write_throughput}};
  static constexpr std::array kNumbers = {
      Number{"prefetch_start_delay", &FvdSettings::prefetch_start_delay},
      Number{"prefetch_over_threshold_throttle_time", &FvdSettings::prefetch_throttle_time}};
  for (const auto& [name, field] : kSwitches)
    if (name == key) {
      IMG_LET(fvd.*field, parse_switch(key, value));
      return true;
    }
  for (const auto& [name, field] : kSizes)
    if (name == key) {
      IMG_LET(const uint64_t size, parse_size(value));
      if (size > INT32_MAX) return fail(ErrorCode::invalid, "{} {} is too large", key, value);
      fvd.*field = static_cast<uint32_t>(size);
      return true;
    }
  for (const auto& [name, field] : kNumbers)
    if (name == key) {
      IMG_LET(fvd.*field, parse_seconds(key, value));
      return true;
    }
  if (key == "data_file" || key == "data_file_fmt") {
    (key == "data_file" ? fvd.data_file : fvd.data_file_format) = value;
    return true;
  }
  if (key != "max_outstanding_copy_on_read_data") return false;
  IMG_LET(fvd.max_outstanding_copy_on_read_data, parse_size(value));
  return true;
}

Result<> set_option(AmendOptions& options, const std::string& key, const std::string& value) {
  IMG_LET(const bool taken, set_fvd_option(options.fvd, key, value));
  if (taken) return {};
  if (key == "compat") {
    options.compat = value;
  } else if (key == "lazy_refcounts") {
    IMG_LET(options.lazy_refcounts, parse_switch(key, value));
  } else if (key == "backing_fmt") {
    options.backing_format = value;
  } else if (key == "data_file_raw") {
    IMG_LET(options.data_file_raw, parse_switch(key, value));
  } else if (key == "backing_file") {
    return fail(ErrorCode::invalid, "the backing file is changed with imgfuse rebase");
  } else if (key == "size") {
    return fail(ErrorCode::invalid, "the size is changed with imgfuse resize");
  } else {
    return fail(ErrorCode::invalid, "\"{}\" cannot be changed (\"imgfuse amend -o help\" lists what can)", key);
  }
  return {};
}

}  // namespace

int run_amend(Io& io, Arguments args) {
  AmendOptions options;
  std::string image;
  std::vector<std::string> lists;
  CommandLine line("Changes the options of an image that exists, and that nobody has open.", "imgfuse amend");
  line.text("IMAGE", image);
  line.texts("-o", lists, "Options as key=value,...; \"-o help\" lists them");
  line.text("-f,--format", options.format, "Format of the image; not guessed if given", "FORMAT");
  line.texts("--allow-path", options.allowed_directories, "Directory in which a backing file may lie");
  if (const auto status = line.parse(io, args)) return *status;

  const auto set = [&](const std::string& key, const std::string& value) { return set_option(options, key, value); };
  if (const auto status = take_option_lists(io, line, lists, kAmendOptionList, set)) return *status;
  if (image.empty()) return line.usage_error(io, Error(ErrorCode::invalid, "IMAGE is missing"));
  if (lists.empty()) return line.usage_error(io, Error(ErrorCode::invalid, "nothing is to be changed: -o is missing"));
  if (auto amended = amend_image(image, options); !amended) {
    print_error(io, image, amended.error());
    return kFailure;
  }
  return kSuccess;
}

}  // namespace imgfuse::tool
