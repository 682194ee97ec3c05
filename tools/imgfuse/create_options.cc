#include "create_options.h"

#include <charconv>
#include <ostream>

#include "text.h"

namespace imgfuse::tool {
namespace {

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

constexpr const char* kCreateOptionList =
    "Options for -o, as qemu-img names them:\n"
    "  size=SIZE            virtual size\n"
    "  backing_file=FILE    file that unallocated clusters are read from\n"
    "  backing_fmt=FORMAT   its format\n"
    "  cluster_size=SIZE    unit of allocation (64k): 512 to 2M, qed 4k to 64M\n"
    "  compat=0.10|1.1      qcow2 version 2 or 3 (1.1)\n"
    "  refcount_bits=N      1, 2, 4, 8, 16, 32 or 64 (16)\n"
    "  lazy_refcounts=on    allow reference counts to be postponed (off)\n"
    "  compression_type=T   zlib or zstd (zlib)\n"
    "  extended_l2=on       32 subclusters per cluster, of 16k or more (off)\n"
    "  data_file=FILE       file that the disk's data lies in\n"
    "  data_file_raw=on     the data file alone equals the disk (off)\n"
    "  table_size=N         qed: clusters per table, 2 to 16 (4)\n"
    "  preallocation=MODE   off, metadata, falloc or full (off)\n"
    "and for -f fvd besides size, backing_file, backing_fmt, data_file and preallocation:\n"
    "  compact_image=on     chunks get storage when they are written (off)\n"
    "  block_size=SIZE      unit of copying from the backing file (512, or a bitmap of 4M)\n"
    "  chunk_size=SIZE      unit of allocation, a multiple of block_size (1M)\n"
    "  storage_grow_unit=SIZE  by how much the file grows (100M)\n"
    "  add_storage_cmd=CMD  program that makes a full device longer\n"
    "  journal_size=SIZE    at least what one request may need, or -1: none (16M)\n"
    "  data_file_fmt=FORMAT  format of the data file\n"
    "  copy_on_read=on      what is read from the backing file is kept (off)\n"
    "  prefetch_start_delay=N  seconds until the backing file is copied, -1: never (-1)\n"
    "  detect_sparse_hole=SIZE  zeros of this length are not read from the backing file (0: off)\n";

/// `key=value,key=value`; a comma inside a value is doubled.
Result<> for_each_option(const std::string& list, const SetOption& set) {
  std::string item;
  const auto set_item = [&]() -> Result<> {
    const size_t equals = item.find('=');
    if (equals == std::string::npos)
      return fail(ErrorCode::invalid, "option \"{}\" has no value; write {}=VALUE", item, item);
    return set(item.substr(0, equals), item.substr(equals + 1));
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

}  // namespace

Result<bool> parse_switch(std::string_view name, std::string_view text) {
  if (text == "on" || text == "true") return true;
  if (text == "off" || text == "false") return false;
  return fail(ErrorCode::invalid, "{} is \"{}\"; it can be on or off", name, text);
}

Result<int32_t> parse_seconds(std::string_view name, std::string_view text) {
  int32_t number = 0;
  const auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || rest != text.data() + text.size())
    return fail(ErrorCode::invalid, "{} is \"{}\"; a whole number is expected", name, text);
  return number;
}

Result<Preallocation> parse_preallocation(std::string_view text) {
  if (text == "off") return Preallocation::off;
  if (text == "metadata") return Preallocation::metadata;
  if (text == "falloc") return Preallocation::falloc;
  if (text == "full") return Preallocation::full;
  return fail(ErrorCode::invalid, "preallocation is \"{}\"; it can be off, metadata, falloc or full", text);
}

Result<> set_create_option(CreateOptions& options, std::string_view key, const std::string& value) {
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
  } else if (key == "extended_l2") {
    IMG_LET(options.extended_l2, parse_switch(key, value));
  } else if (key == "data_file") {
    options.data_file = value;
  } else if (key == "data_file_raw") {
    IMG_LET(options.data_file_raw, parse_switch(key, value));
  } else if (key == "table_size") {
    IMG_LET(options.table_size, parse_small_size(key, value));
  } else if (key == "preallocation") {
    IMG_LET(options.preallocation, parse_preallocation(value));
  } else if (key == "compact_image") {
    IMG_LET(options.fvd.compact, parse_switch(key, value));
  } else if (key == "block_size") {
    IMG_LET(options.fvd.block_size, parse_size(value));
  } else if (key == "chunk_size") {
    IMG_LET(options.fvd.chunk_size, parse_size(value));
  } else if (key == "storage_grow_unit") {
    IMG_LET(options.fvd.storage_grow_unit, parse_size(value));
  } else if (key == "add_storage_cmd") {
    options.fvd.add_storage_command = value;
  } else if (key == "journal_size") {
    options.fvd.journal = value != "-1";
    if (options.fvd.journal) {
      IMG_LET(options.fvd.journal_size, parse_size(value));
    }
  } else if (key == "data_file_fmt") {
    options.fvd.data_file_format = value;
  } else if (key == "copy_on_read") {
    IMG_LET(options.fvd.copy_on_read, parse_switch(key, value));
  } else if (key == "prefetch_start_delay") {
    IMG_LET(options.fvd.prefetch_start_delay, parse_seconds(key, value));
  } else if (key == "detect_sparse_hole") {
    IMG_LET(options.fvd.detect_sparse_hole, parse_size(value));
  } else {
    return fail(ErrorCode::invalid, "no option \"{}\" (\"imgfuse create -o help\" lists them)", key);
  }
  return {};
}

std::optional<int> take_option_lists(Io& io, const CommandLine& line, const std::vector<std::string>& lists,
                                     const char* known, const SetOption& set) {
  for (const std::string& list : lists) {
    if (list == "help" || list == "?") {
      io.out << known << std::flush;
      return kSuccess;
    }
    if (const auto taken = for_each_option(list, set); !taken) return line.usage_error(io, taken.error());
  }
  return std::nullopt;
}

std::optional<int> take_create_options(Io& io, const CommandLine& line, const std::vector<std::string>& lists,
                                       CreateOptions& options) {
  return take_option_lists(io, line, lists, kCreateOptionList, [&](const std::string& key, const std::string& value) {
    return set_create_option(options, key, value);
  });
}

}  // namespace imgfuse::tool
