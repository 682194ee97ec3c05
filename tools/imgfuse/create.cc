// imgfuse create: make a new image.
#include <fmt/format.h>

#include "command.h"
#include "imgfuse/create.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

constexpr const char* kOptionList =
    "Options for -o, as qemu-img names them:\n"
    "  size=SIZE            virtual size\n"
    "  backing_file=FILE    file that unallocated clusters are read from\n"
    "  backing_fmt=FORMAT   its format\n"
    "  cluster_size=SIZE    unit of allocation, 512 to 2M (64k)\n"
    "  compat=0.10|1.1      qcow2 version 2 or 3 (1.1)\n"
    "  refcount_bits=N      1, 2, 4, 8, 16, 32 or 64 (16)\n"
    "  lazy_refcounts=on    allow reference counts to be postponed (off)\n"
    "  compression_type=T   zlib or zstd (zlib)\n"
    "  preallocation=MODE   off, metadata, falloc or full (off)\n";

Result<bool> parse_switch(std::string_view name, std::string_view text) {
  if (text == "on" || text == "true") return true;
  if (text == "off" || text == "false") return false;
  return fail(ErrorCode::invalid, "{} is \"{}\"; it can be on or off", name, text);
}

Result<uint32_t> parse_small_size(std::string_view name, std::string_view text) {
  IMG_LET(const uint64_t size, parse_size(text));
  if (size > UINT32_MAX) return fail(ErrorCode::invalid, "{} {} is too large", name, text);
  return static_cast<uint32_t>(size);
}

Result<uint32_t> parse_version(std::string_view text) {
  if (text == "0.10" || text == "v2") return 2;
  if (text == "1.1" || text == "v3") return 3;
  return fail(ErrorCode::invalid, "compat is \"{}\"; it can be 0.10 or 1.1", text);
}

Result<Preallocation> parse_preallocation(std::string_view text) {
  if (text == "off") return Preallocation::off;
  if (text == "metadata") return Preallocation::metadata;
  if (text == "falloc") return Preallocation::falloc;
  if (text == "full") return Preallocation::full;
  return fail(ErrorCode::invalid, "preallocation is \"{}\"; it can be off, metadata, falloc or full", text);
}

/// One `key=value`, by qemu-img's names. The long options set the same keys.
Result<> set_option(CreateOptions& options, std::string_view key, const std::string& value) {
  if (key == "size") {
    IMG_LET(options.size, parse_size(value));
  } else if (key == "backing_file") {
    options.backing_file = value;
  } else if (key == "backing_fmt") {
    options.backing_format = value;
  } else if (key == "cluster_size") {
    IMG_LET(options.cluster_size, parse_small_size(key, value));
  } else if (key == "compat") {
    IMG_LET(options.version, parse_version(value));
  } else if (key == "refcount_bits") {
    IMG_LET(options.refcount_bits, parse_small_size(key, value));
  } else if (key == "lazy_refcounts") {
    IMG_LET(options.lazy_refcounts, parse_switch(key, value));
  } else if (key == "compression_type") {
    options.compression_type = value;
  } else if (key == "preallocation") {
    IMG_LET(options.preallocation, parse_preallocation(value));
  } else {
    return fail(ErrorCode::invalid, "no option \"{}\" (\"imgfuse create -o help\" lists them)", key);
  }
  return {};
}

/// `key=value,key=value`; a comma inside a value is doubled.
Result<> set_options(CreateOptions& options, const std::string& list) {
  std::string item;
  const auto set_item = [&]() -> Result<> {
    const size_t equals = item.find('=');
    if (equals == std::string::npos)
      return fail(ErrorCode::invalid, "option \"{}\" has no value; write {}=VALUE", item, item);
    return set_option(options, item.substr(0, equals), item.substr(equals + 1));
  };
  for (size_t at = 0; at < list.size(); ++at) {
    if (list[at] != ',') {
      item += list[at];
    } else if (at + 1 < list.size() && list[at + 1] == ',') {
      item += list[at++];
    } else {
      IMG_TRY(set_item());
      item.clear();
    }
  }
  return item.empty() ? Result<>{} : set_item();
}

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
  app.add_option("-f,--format", options.format, "qcow2 (default) or raw");
  app.add_option("-o", lists, "Options as key=value,...; \"-o help\" lists them")->allow_extra_args(false);
  add_key(app, keys, "-b,--backing", "backing_file", "File that unallocated clusters are read from");
  add_key(app, keys, "-F,--backing-format", "backing_fmt", "Format of the backing file; required with -b");
  add_key(app, keys, "--cluster-size", "cluster_size", "Unit of allocation, 512 to 2M (64k)");
  add_key(app, keys, "--compat", "compat", "0.10 (version 2) or 1.1 (version 3)");
  add_key(app, keys, "--refcount-bits", "refcount_bits", "1, 2, 4, 8, 16, 32 or 64 (16)");
  add_key(app, keys, "--compression-type", "compression_type", "zlib or zstd (zlib)");
  add_key(app, keys, "--preallocation", "preallocation", "off, metadata, falloc or full (off)");
  app.add_flag("--lazy-refcounts", options.lazy_refcounts, "Allow reference counts to be postponed");
  app.add_option("--allow-path", options.allowed_directories, "Directory in which the backing file may lie")
      ->allow_extra_args(false);
  if (const auto status = parse(app, io, args)) return *status;

  const auto usage_error = [&](const Error& error) {
    print_error(io, "", error, "\"imgfuse create --help\" lists the options");
    return kUsage;
  };
  for (const std::string& list : lists) {
    if (list == "help" || list == "?") {
      io.out << kOptionList << std::flush;
      return kSuccess;
    }
    if (auto set = set_options(options, list); !set) return usage_error(set.error());
  }
  for (const auto& [key, value] : keys)
    if (auto set = set_option(options, key, value); !set) return usage_error(set.error());
  if (image.empty()) return usage_error(Error(ErrorCode::invalid, "FILE is missing"));
  if (auto created = create_image(image, options); !created) {
    print_error(io, image, created.error());
    return kFailure;
  }
  return kSuccess;
}

}  // namespace imgfuse::tool
