// imgfuse convert: copy images to a new one, of any format.
#include <fmt/format.h>
#include <algorithm>
#include <filesystem>
#include <thread>

#include "command_line.h"
#include "create_options.h"
#include "imgfuse/check.h"
#include "imgfuse/create.h"
#include "imgfuse/job.h"
#include "open_disk.h"
#include "progress.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

constexpr uint64_t kSector = 512;
constexpr uint64_t kLongestSparse = 2147483136;
constexpr unsigned kMostCoroutines = 16;

struct Request {
  std::vector<std::string> sources;
  std::string target;
  OpenOptions source_options{.read_only = true};
  OpenOptions target_options{.cache = CacheMode::unsafe};
  CreateOptions create{.format = "raw"};
  ConvertOptions convert;
  bool compress = false;
  bool out_of_order = false;    ///< asked for; it is so in any case
  bool use_existing = false;    ///< -n
  bool target_is_zero = false;  ///< as the user says
  ShowProgress show = ShowProgress::on_terminal;
};

/// Where the target's data file will lie.
std::string data_file_of(const Request& request) {
  return std::filesystem::path(directory_of(request.target)) / *request.create.data_file;
}

/// Locks would tell, were they not switched off with --force-share.
Result<> check_not_a_source(const Request& request) {
  for (const std::string& source : request.sources) {
    IMG_LET(const bool found, chain_contains(source, request.source_options, request.target));
    if (found) return fail(ErrorCode::invalid, "{} is read from: it cannot be the target too", request.target);
    if (!request.create.data_file) continue;
    const std::string data_file = data_file_of(request);
    IMG_LET(const bool data_found, chain_contains(source, request.source_options, data_file));
    if (data_found) return fail(ErrorCode::invalid, "{} is read from: it cannot be the data file too", data_file);
  }
  return {};
}

Result<std::vector<OpenDisk>> open_sources(const Request& request) {
  std::vector<OpenDisk> disks;
  for (const std::string& source : request.sources) {
    IMG_LET(OpenDisk disk, OpenDisk::open(source, request.source_options));
    disks.push_back(std::move(disk));
  }
  return disks;
}

/// The images that are read from a second one are laid behind the first, each at a sector's begin.
uint64_t total_size(std::vector<OpenDisk>& sources) {
  uint64_t total = 0;
  for (OpenDisk& source : sources) total += (source->size() + kSector - 1) / kSector * kSector;
  return total;
}

Result<std::string> compression_of(const Request& request) {
  if (request.create.format != "qcow2")
    return fail(ErrorCode::invalid, "a {} image cannot be compressed; qcow2 can be", request.create.format);
  if (!request.use_existing) return request.create.compression_type;
  IMG_LET(const ImageInfo info, image_info(request.target, {.format = request.create.format}));
  return info.qcow2->compression_type;
}

Result<OpenDisk> open_target(const Request& request) {
  OpenOptions options = request.target_options;
  options.format = request.create.format;
  options.backing_format = request.create.backing_format;
  if (request.compress) {
    IMG_LET(options.compress, compression_of(request));
  }
  return OpenDisk::open(request.target, options);
}

Result<> check(const Request& request) {
  if (request.compress && request.create.preallocation != Preallocation::off)
    return fail(ErrorCode::invalid,
                "compressed data takes the space it needs; -c and preallocation exclude each other");
  if (request.compress) IMG_TRY(compression_of(request));
  if (request.compress && request.create.data_file)
    return fail(ErrorCode::invalid, "a data file holds no compressed clusters; -c and data_file exclude each other");
  return check_not_a_source(request);
}

Result<> copy(const Request& request, std::vector<OpenDisk>& sources, OpenDisk& target, Io& io) {
  ConvertOptions options = request.convert;
  const bool fresh = !request.use_existing && !request.create.backing_file;
  options.target_is_zero = fresh || request.target_is_zero;
  options.same_backing = request.create.backing_file.has_value();
  const uint64_t total = total_size(sources);
  ProgressBar bar(io, request.show);
  for (OpenDisk& source : sources) {
    IMG_TRY(convert(*source, *target, options, bar.part(options.target_offset, total)));
    options.target_offset += (source->size() + kSector - 1) / kSector * kSector;
  }
  return {};
}

Result<> convert_images(Request request, Io& io) {
  IMG_LET(std::vector<OpenDisk> sources, open_sources(request));
  IMG_TRY(check(request));
  NewFile created(request.target);
  NewFile data_file(request.create.data_file ? data_file_of(request) : "");
  if (!request.use_existing) {
    request.create.size = total_size(sources);
    request.create.durable = request.target_options.cache != CacheMode::unsafe;
    const bool new_data_file = request.create.data_file && !std::filesystem::exists(data_file_of(request));
    IMG_TRY(create_image(request.target, request.create));
    created.made();
    if (new_data_file) data_file.made();
  }
  IMG_LET(OpenDisk target, open_target(request));
  auto copied = copy(request, sources, target, io);
  auto closed = target.close();
  if (!copied) return fail(copied.error().during("convert to {}", request.target));
  if (!closed) return fail(closed.error().during("close {}", request.target));
  created.keep();
  data_file.keep();
  return {};
}

Result<uint64_t> parse_sparse(const std::string& text) {
  IMG_LET(const uint64_t size, parse_size(text));
  if (size % kSector != 0 || size > kLongestSparse)
    return fail(ErrorCode::invalid, "-S {}: a multiple of 512 up to {} is possible, or 0 for no holes", text,
                kLongestSparse);
  return size;
}

void add_options(CommandLine& line, Request& request, std::vector<std::string>& files, std::vector<std::string>& lists,
                 std::string& sparse) {
  line.texts("IMAGES", files, "The image to read, or several, which are laid one behind the other; then the target");
  line.text("-f,--format", request.source_options.format, "Format of the images read", "FORMAT");
  line.text("-O,--target-format", request.create.format, "Format of the target: raw (default), qcow2, qed or fvd",
            "FORMAT");
  line.texts("-o", lists, "Options of the target as key=value,...; \"-o help\" lists them");
  line.flag("-c,--compress", request.compress, "Compress the target");
  line.text("-B,--backing", request.create.backing_file,
            "Backing file of the target, which reads as the backing file of IMAGE does");
  line.text("-F,--backing-format", request.create.backing_format,
            "Its format, and that of backing files whose overlay does not record it", "FORMAT");
  add_snapshot_option(line, request.source_options.snapshot);
  line.text("-S,--sparse", sparse, "Shortest run of zeros that becomes a hole (4k); 0: none does", "SIZE");
  line.flag("-n,--no-create", request.use_existing, "Write into a target that is there, and large enough");
  line.flag("--target-is-zero", request.target_is_zero, "With -n: the target reads as zeros, which need no writing");
  line.number("-m,--parallel", request.convert.workers, "How much is in flight at once, 1 to 16", "COUNT", 1,
              kMostCoroutines);
  line.flag("-W,--out-of-order", request.out_of_order,
            "Accepted for qemu-img's sake: the target is always written in any order");
  line.word("-t,--target-cache", request.target_options.cache, parse_cache_mode,
            "How the target is written: unsafe (default), writeback, none, writethrough, directsync", "MODE");
  line.word("-T,--source-cache", request.source_options.cache, parse_cache_mode,
            "How the images are read: writeback (default) or none", "MODE");
  add_allow_path_option(line, request.source_options.allowed_directories);
  line.flag("-U,--force-share", request.source_options.force_share,
            "Take no locks on the images read: somebody else may write them");
  add_progress_options(line, request.show);
}

/// Compressing keeps the processors busy, and some threads more have its reads and writes overlap with it; for mere
/// copying a few threads are enough.
unsigned default_workers(const Request& request) {
  return request.compress ? kDefaultWorkers + std::thread::hardware_concurrency() : kDefaultWorkers;
}

}  // namespace

int run_convert(Io& io, Arguments args) {
  Request request;
  request.convert.workers = 0;  // nobody has said
  std::vector<std::string> files, lists;
  std::string sparse = "4k";
  CommandLine line("Copies an image, or several one behind the other, to a new image of any format.",
                   "imgfuse convert");
  add_options(line, request, files, lists, sparse);
  if (const auto status = line.parse(io, args)) return *status;

  if (const auto status = take_create_options(io, line, lists, request.create)) return *status;
  if (files.size() < 2)
    return line.usage_error(io, Error(ErrorCode::invalid, "an image to read and a target are needed"));
  const auto shortest = parse_sparse(sparse);
  if (!shortest) return line.usage_error(io, shortest.error());
  request.convert.sparse = *shortest;
  if (request.convert.workers == 0) request.convert.workers = default_workers(request);
  request.target = files.back();
  files.pop_back();
  request.sources = std::move(files);
  request.create.allowed_directories = request.source_options.allowed_directories;
  request.target_options.allowed_directories = request.source_options.allowed_directories;

  if (auto converted = convert_images(std::move(request), io); !converted) {
    print_error(io, "", converted.error());
    return kFailure;
  }
  return kSuccess;
}

}  // namespace imgfuse::tool
