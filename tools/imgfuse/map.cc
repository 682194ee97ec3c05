// imgfuse map: which parts of the disk hold data, and where it lies.
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "command_line.h"
#include "imgfuse/check.h"
#include "imgfuse/open.h"
#include "target.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

/// Merges extents that the file describes alike, and hands each on once it is complete.
template <class Sink>
Result<> for_each_extent(Disk& disk, Sink&& sink) {
  std::optional<Extent> open;
  for (GuestRange rest{GuestOffset(0), disk.size()}; !rest.empty();) {
    IMG_LET(const std::vector<Extent> extents, disk.map(rest));
    for (const Extent& next : extents) {
      const bool continues = open && open->kind == next.kind && open->depth == next.depth &&
                             open->compressed == next.compressed && open->has_host_offset == next.has_host_offset &&
                             (!next.has_host_offset || open->host + open->range.length == next.host);
      if (continues) {
        open->range.length += next.range.length;
        continue;
      }
      if (open) sink(*open);
      open = next;
    }
    const GuestOffset end = extents.back().range.end();
    rest = {end, rest.end() - end};
  }
  if (open) sink(*open);
  return {};
}

/// qemu-img's keys and layout: one object per line.
Result<> print_json(Io& io, Disk& disk) {
  const char* before = "[";
  IMG_TRY(for_each_extent(disk, [&](const Extent& extent) {
    const bool data = extent.kind == ExtentKind::data;
    io.out << before
           << fmt::format(
                  "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}",
                  extent.range.begin.bytes(), extent.range.length, extent.depth, extent.kind != ExtentKind::hole, !data,
                  data);
    if (extent.has_host_offset) io.out << fmt::format(", \"offset\": {}", extent.host.bytes());
    io.out << "}";
    before = ",\n";
  }));
  io.out << (disk.size() == 0 ? "[]\n" : "]\n") << std::flush;
  return {};
}

/// Where a layer's data lies.
std::string file_of(const ImageInfo& layer) { return printable(layer.full_data_file.value_or(layer.filename)); }

/// Data only; `files` names the chain's layers.
Result<> print_table(Io& io, Disk& disk, const std::vector<ImageInfo>& files) {
  io.out << fmt::format("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File");
  return for_each_extent(disk, [&](const Extent& extent) {
    if (extent.kind != ExtentKind::data) return;
    const std::string file = extent.depth < files.size() ? file_of(files[extent.depth]) : "?";
    const std::string host = extent.has_host_offset ? fmt::format("{:#x}", extent.host.bytes()) : "compressed";
    io.out << fmt::format("{:<#16x}{:<#16x}{:<16}{}\n", extent.range.begin.bytes(), extent.range.length, host, file);
  });
}

Result<> map(Io& io, const std::string& image, const OpenOptions& options, bool json) {
  std::vector<ImageInfo> files;
  if (!json) {
    IMG_LET(files, chain_info(image, options));
  }
  IMG_LET(const auto disk, open_disk(image, options));
  IMG_TRY(json ? print_json(io, *disk) : print_table(io, *disk, files));
  return disk->close();
}

/// What a dirty bitmap says. The image may be mounted.
Result<> changed_since(Io& io, const std::string& image, const OpenOptions& options, const std::string& bitmap,
                       bool json) {
  IMG_LET(Target target, Target::open(image, options));
  std::optional<GuestRange> open;  // answers come in parts, and a range may go on in the next one
  const char* before = "[";
  const auto print = [&] {
    if (!open) return;
    if (json) {
      io.out << fmt::format("{}{{ \"start\": {}, \"length\": {}}}", before, open->begin.bytes(), open->length);
      before = ",\n";
    } else {
      io.out << fmt::format("{:<#16x}{:<#16x}\n", open->begin.bytes(), open->length);
    }
  };
  if (!json) io.out << fmt::format("{:<16}{:<16}\n", "Offset", "Length");
  for (uint64_t start = 0;;) {
    IMG_LET(const control::Json answer, target.run("changed-since", {{"name", bitmap}, {"start", start}}));
    for (const control::Json& range : answer.at("ranges")) {
      const GuestRange next{GuestOffset(range.at("start").get<uint64_t>()), range.at("length").get<uint64_t>()};
      if (open && open->end() == next.begin) {
        open->length += next.length;
        continue;
      }
      print();
      open = next;
    }
    const uint64_t end = answer.at("end").get<uint64_t>();
    if (end >= answer.at("virtual-size").get<uint64_t>() || end <= start) break;
    start = end;
  }
  print();
  if (json) io.out << (open ? "]\n" : "[]\n");
  io.out << std::flush;
  return target.close();
}

}  // namespace

int run_map(Io& io, Arguments args) {
  std::string image;
  OpenOptions options{.read_only = true};
  bool json = false;
  std::string bitmap;
  CommandLine line("Lists which parts of the disk hold data, in which file of the chain, and where.", "imgfuse map");
  line.text("IMAGE", image).required();
  line.text("--changed-since", bitmap, "What changed since this dirty bitmap was added or cleared", "BITMAP");
  add_open_options(line, options);
  add_json_option(line, json);
  if (const auto status = line.parse(io, args)) return *status;
  const auto mapped = bitmap.empty() ? map(io, image, options, json) : changed_since(io, image, options, bitmap, json);
  if (!mapped) {
    io.out << std::flush;
    print_error(io, image, mapped.error());
    return kFailure;
  }
  return kSuccess;
}

}  // namespace imgfuse::tool
