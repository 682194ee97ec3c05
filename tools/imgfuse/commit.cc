// imgfuse commit: move what an overlay holds into its backing file.
#include "command_line.h"
#include "imgfuse/check.h"
#include "imgfuse/job.h"
#include "live_job.h"
#include "open_disk.h"
#include "progress.h"
#include "target.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

struct Request {
  std::string image;  ///< or a mount point
  OpenOptions options;
  std::optional<std::string> base;
  bool keep = false;  ///< -d: do not empty the overlay
  ShowProgress show = ShowProgress::on_terminal;
  LiveOptions live;
};

/// What cannot be emptied keeps what the base holds too.
Result<> empty(Disk& overlay, const ImageInfo& image) {
  return check_can_be_emptied(image) ? overlay.forget({GuestOffset(0), overlay.size()}) : Result<>();
}

Result<> commit_image(const Request& request, Io& io) {
  OpenOptions look = request.options;
  look.read_only = true;
  IMG_LET(const std::vector<ImageInfo> chain, chain_info(request.image, look));
  IMG_LET(const uint32_t layers, find_base(chain, request.base));

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

/// Of a disk that is in use.
Result<> commit_live(const Request& request, control::Client& daemon, Io& io) {
  if (request.keep) return fail(ErrorCode::invalid, "it is mounted: what has been committed does not stay in it");
  return run_chain_job(daemon, JobKind::commit, request.base, request.live, request.show, io);
}

Result<> commit_anywhere(const Request& request, Io& io) {
  auto daemon = connect_to_daemon(request.image);
  if (daemon) return commit_live(request, *daemon, io);
  if (daemon.error().code() != ErrorCode::not_found) return fail(daemon.error());
  if (request.live.rate > 0 || request.live.detach)
    return fail(ErrorCode::invalid, "--rate and --detach are for a disk that is mounted");
  return commit_image(request, io);
}

}  // namespace

int run_commit(Io& io, Arguments args) {
  Request request;
  CommandLine line("Moves what an overlay holds into its backing file. A mount goes on with that one.",
                   "imgfuse commit");
  line.text("IMAGE", request.image, "An overlay, or where it is mounted").required();
  line.text("-b,--base", request.base,
            "Commit into this image of the backing chain; leaves IMAGE as it is unless it is mounted");
  line.flag("-d,--keep", request.keep, "Do not empty the overlay afterwards");
  add_live_options(line, request.live);
  line.word("-t,--cache", request.options.cache, parse_cache_mode,
            "How the images are written: writeback (default) or none", "MODE");
  add_progress_options(line, request.show, "Say nothing on success");
  add_format_option(line, request.options.format);
  line.text("-F,--backing-format", request.options.backing_format,
            "Format of backing files whose overlay does not record it", "FORMAT");
  add_allow_path_option(line, request.options.allowed_directories);
  if (const auto status = line.parse(io, args)) return *status;

  if (auto committed = commit_anywhere(request, io); !committed) {
    print_error(io, request.image, committed.error());
    return kFailure;
  }
  if (request.show != ShowProgress::never && !request.live.detach) io.out << "Image committed.\n" << std::flush;
  return kSuccess;
}

}  // namespace imgfuse::tool
