// imgfuse commit: move what an overlay holds into its backing file.
#include <algorithm>

#include "command.h"
#include "imgfuse/check.h"
#include "imgfuse/job.h"
#include "open_disk.h"
#include "progress.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

struct Request {
  std::string image;
  OpenOptions options;
  std::optional<std::string> base;
  bool keep = false;  ///< -d: do not empty the overlay
  ShowProgress show = ShowProgress::on_terminal;
};

/// The place of the base in the chain: 1 is the image's own backing file.
Result<uint32_t> find_base(const Request& request, const std::vector<ImageInfo>& chain) {
  if (chain.size() < 2) return fail(ErrorCode::invalid, "{} has no backing file", request.image);
  if (!request.base) return 1;
  for (uint32_t i = 1; i < chain.size(); ++i)
    if (same_file(chain[i].filename, *request.base) || chain[i - 1].backing_filename == *request.base) return i;
  return fail(ErrorCode::not_found, "{} is not in the backing chain of {}", *request.base, request.image);
}

/// What cannot be emptied keeps what the base holds too: formats that take no cluster back, and FVD images that are
/// longer than what they show of their base.
Result<> empty(Disk& overlay, const ImageInfo& image) {
  if (image.fvd && image.fvd->base_size < image.virtual_size) return {};
  Result<> emptied = overlay.forget({GuestOffset(0), overlay.size()});
  if (!emptied && emptied.error().code() == ErrorCode::unsupported) return {};
  return emptied;
}

Result<> commit_image(const Request& request, Io& io) {
  OpenOptions look = request.options;
  look.read_only = true;
  IMG_LET(const std::vector<ImageInfo> chain, chain_info(request.image, look));
  IMG_LET(const uint32_t layers, find_base(request, chain));

  // The base is written through a disk of its own, so the overlay's chain ends above it.
  OpenOptions base_options = request.options;
  base_options.format = chain[layers].format;
  base_options.allowed_directories.push_back(directory_of(request.image));
  IMG_LET(OpenDisk base, OpenDisk::open(chain[layers].filename, base_options));
  OpenOptions overlay_options = request.options;
  overlay_options.chain_end = chain[layers].filename;
  IMG_LET(OpenDisk overlay, OpenDisk::open(request.image, overlay_options));

  {
    ProgressBar bar(io, request.show);
    auto committed = commit(*overlay, *base, layers, bar.all());
    if (!committed) return fail(committed.error().during("commit to {}", chain[layers].filename));
  }
  IMG_TRY(base.close());
  // With images in between, which do not hold what the base does now, the overlay alone stays right.
  if (!request.keep && !request.base) IMG_TRY(empty(*overlay, chain.front()));
  return overlay.close();
}

}  // namespace

int run_commit(Io& io, Arguments args) {
  Request request;
  bool quiet = false;
  CLI::App app("Moves what an overlay holds into its backing file.", "imgfuse commit");
  app.add_option("IMAGE", request.image)->required();
  app.add_option_function<std::string>(
      "-b,--base", [&](const std::string& name) { request.base = name; },
      "Commit into this image of the backing chain; leaves IMAGE as it is");
  app.add_flag("-d,--keep", request.keep, "Do not empty the overlay afterwards");
  add_cache_option(app, "-t,--cache", request.options.cache, "How the images are written: writeback (default) or none");
  app.add_flag_callback(
      "-p,--progress", [&] { request.show = ShowProgress::always; }, "Show progress, not only on a terminal");
  app.add_flag("-q,--quiet", quiet, "Say nothing on success");
  app.add_option_function<std::string>(
      "-f,--format", [&](const std::string& name) { request.options.format = name; },
      "The image's format; found out from the image if not given");
  app.add_option_function<std::string>(
      "-F,--backing-format", [&](const std::string& name) { request.options.backing_format = name; },
      "Format of backing files whose overlay does not record it");
  add_allow_path_option(app, request.options.allowed_directories);
  if (const auto status = parse(app, io, args)) return *status;
  if (quiet) request.show = ShowProgress::never;

  if (auto committed = commit_image(request, io); !committed) {
    print_error(io, request.image, committed.error());
    return kFailure;
  }
  if (!quiet) io.out << "Image committed.\n" << std::flush;
  return kSuccess;
}

}  // namespace imgfuse::tool
