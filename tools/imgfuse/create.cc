// imgfuse create: make a new image.
#include <fmt/format.h>

#include "command_line.h"
#include "create_options.h"
#include "imgfuse/create.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

/// What sets the key of the same meaning.
void add_key(CommandLine& line, std::vector<std::pair<std::string, std::string>>& keys, const std::string& names,
             const std::string& key, const std::string& description) {
  const auto set = [&keys, key](const std::string& value) -> Result<> {
    keys.emplace_back(key, value);
    return {};
  };
  line.take(names, set, description, "VALUE");
}

}  // namespace

int run_create(Io& io, Arguments args) {
  CreateOptions options;
  std::string image;
  std::vector<std::string> lists;
  std::vector<std::pair<std::string, std::string>> keys;
  CommandLine line("Makes a new image.", "imgfuse create");
  line.text("FILE", image, "The new image; an existing file is replaced");
  add_key(line, keys, "SIZE", "size", "Virtual size, as 10G; default: the backing file's");
  line.text("-f,--format", options.format, "qcow2 (default), qed, fvd or raw", "FORMAT");
  line.texts("-o", lists, "Options as key=value,...; \"-o help\" lists them");
  add_key(line, keys, "-b,--backing", "backing_file", "File that unallocated clusters are read from");
  add_key(line, keys, "-F,--backing-format", "backing_fmt", "Format of the backing file; required with -b");
  add_key(line, keys, "--cluster-size", "cluster_size", "Unit of allocation, 512 to 2M (64k)");
  add_key(line, keys, "--compat", "compat", "0.10 (version 2) or 1.1 (version 3)");
  add_key(line, keys, "--refcount-bits", "refcount_bits", "1, 2, 4, 8, 16, 32 or 64 (16)");
  add_key(line, keys, "--compression-type", "compression_type", "zlib or zstd (zlib)");
  add_key(line, keys, "--data-file", "data_file", "File that the disk's data lies in; made, or emptied");
  add_key(line, keys, "--table-size", "table_size", "QED: clusters per table, 2 to 16 (4)");
  add_key(line, keys, "--preallocation", "preallocation", "off, metadata, falloc or full (off)");
  line.flag("--lazy-refcounts", options.lazy_refcounts, "Allow reference counts to be postponed");
  line.flag("--extended-l2", options.extended_l2, "32 subclusters per cluster, of 16k or more");
  line.flag("--data-file-raw", options.data_file_raw, "The data file alone equals the disk");
  line.texts("--allow-path", options.allowed_directories,
             "Directory in which the backing file and the data file may lie");
  if (const auto status = line.parse(io, args)) return *status;

  if (const auto status = take_create_options(io, line, lists, options)) return *status;
  for (const auto& [key, value] : keys)
    if (auto set = set_create_option(options, key, value); !set) return line.usage_error(io, set.error());
  if (image.empty()) return line.usage_error(io, Error(ErrorCode::invalid, "FILE is missing"));
  if (auto created = create_image(image, options); !created) {
    print_error(io, image, created.error());
    return kFailure;
  }
  return kSuccess;
}

}  // namespace imgfuse::tool
