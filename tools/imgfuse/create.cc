// imgfuse create: make a new image.
#include <fmt/format.h>

#include "command.h"
#include "create_options.h"
#include "imgfuse/create.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

/// A long option that sets the key of the same meaning.
void add_key(CLI::App& app, std::vector<std::pair<std::string, std::string>>& keys, const std::string& names,
             const std::string& key, const std::string& description) {
  app.add_option_function<std::string>(
         names, [&keys, key](const std::string& value) { keys.emplace_back(key, value); }, description)
      ->type_name("VALUE");
}

}  // namespace

int run_create(Io& io, Arguments args) {
  CreateOptions options;
  std::string image;
  std::vector<std::string> lists;
  std::vector<std::pair<std::string, std::string>> keys;
  CLI::App app("Makes a new image.", "imgfuse create");
  app.add_option("FILE", image, "The new image; an existing file is replaced");
  app.add_option_function<std::string>(
      "SIZE", [&](const std::string& size) { keys.emplace_back("size", size); },
      "Virtual size, as 10G; default: the backing file's");
  app.add_option("-f,--format", options.format, "qcow2 (default), qed, fvd or raw");
  app.add_option("-o", lists, "Options as key=value,...; \"-o help\" lists them")->allow_extra_args(false);
  add_key(app, keys, "-b,--backing", "backing_file", "File that unallocated clusters are read from");
  add_key(app, keys, "-F,--backing-format", "backing_fmt", "Format of the backing file; required with -b");
  add_key(app, keys, "--cluster-size", "cluster_size", "Unit of allocation, 512 to 2M (64k)");
  add_key(app, keys, "--compat", "compat", "0.10 (version 2) or 1.1 (version 3)");
  add_key(app, keys, "--refcount-bits", "refcount_bits", "1, 2, 4, 8, 16, 32 or 64 (16)");
  add_key(app, keys, "--compression-type", "compression_type", "zlib or zstd (zlib)");
  add_key(app, keys, "--data-file", "data_file", "File that the disk's data lies in; made, or emptied");
  add_key(app, keys, "--table-size", "table_size", "QED: clusters per table, 2 to 16 (4)");
  add_key(app, keys, "--preallocation", "preallocation", "off, metadata, falloc or full (off)");
  app.add_flag("--lazy-refcounts", options.lazy_refcounts, "Allow reference counts to be postponed");
  app.add_flag("--extended-l2", options.extended_l2, "32 subclusters per cluster, of 16k or more");
  app.add_flag("--data-file-raw", options.data_file_raw, "The data file alone equals the disk");
  app.add_option("--allow-path", options.allowed_directories,
                 "Directory in which the backing file and the data file may lie")
      ->allow_extra_args(false);
  if (const auto status = parse(app, io, args)) return *status;

  const auto usage_error = [&](const Error& error) {
    print_error(io, "", error, "\"imgfuse create --help\" lists the options");
    return kUsage;
  };
  for (const std::string& list : lists) {
    if (list == "help" || list == "?") {
      io.out << kCreateOptionList << std::flush;
      return kSuccess;
    }
    if (auto set = set_create_options(options, list); !set) return usage_error(set.error());
  }
  for (const auto& [key, value] : keys)
    if (auto set = set_create_option(options, key, value); !set) return usage_error(set.error());
  if (image.empty()) return usage_error(Error(ErrorCode::invalid, "FILE is missing"));
  if (auto created = create_image(image, options); !created) {
    print_error(io, image, created.error());
    return kFailure;
  }
  return kSuccess;
}

}  // namespace imgfuse::tool
