// imgfuse amend: change the options of an image that exists.
#include "imgfuse/amend.h"

#include "command.h"
#include "create_options.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

constexpr const char* kAmendOptionList =
    "Options for -o, as qemu-img names them:\n"
    "  compat=0.10|1.1      qcow2 version 2 or 3\n"
    "  lazy_refcounts=on    allow reference counts to be postponed\n"
    "  backing_fmt=FORMAT   format of the backing file\n"
    "  data_file_raw=off    the data file alone no longer equals the disk\n";

Result<> set_option(AmendOptions& options, const std::string& key, const std::string& value) {
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
  CLI::App app("Changes the options of an image that exists, and that nobody has open.", "imgfuse amend");
  app.add_option("IMAGE", image);
  app.add_option("-o", lists, "Options as key=value,...; \"-o help\" lists them")->allow_extra_args(false);
  app.add_option("-f,--format", options.format, "Format of the image; not guessed if given");
  app.add_option("--allow-path", options.allowed_directories, "Directory in which a backing file may lie")
      ->allow_extra_args(false);
  if (const auto status = parse(app, io, args)) return *status;

  const auto usage_error = [&](const Error& error) {
    print_error(io, "", error, "\"imgfuse amend --help\" lists the options");
    return kUsage;
  };
  for (const std::string& list : lists) {
    if (list == "help" || list == "?") {
      io.out << kAmendOptionList << std::flush;
      return kSuccess;
    }
    const auto set = for_each_option(
        list, [&](const std::string& key, const std::string& value) { return set_option(options, key, value); });
    if (!set) return usage_error(set.error());
  }
  if (image.empty()) return usage_error(Error(ErrorCode::invalid, "IMAGE is missing"));
  if (lists.empty()) return usage_error(Error(ErrorCode::invalid, "nothing is to be changed: -o is missing"));
  if (auto amended = amend_image(image, options); !amended) {
    print_error(io, image, amended.error());
    return kFailure;
  }
  return kSuccess;
}

}  // namespace imgfuse::tool
