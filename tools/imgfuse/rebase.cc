// imgfuse rebase: give an image another backing file.
#include <filesystem>

#include "command_line.h"
#include "imgfuse/amend.h"
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
  CacheMode backing_cache = CacheMode::writeback;
  std::string backing;  ///< as it will be recorded; empty: none
  std::optional<std::string> backing_format;
  bool unsafe = false;
  ShowProgress show = ShowProgress::on_terminal;
};

Result<> check(const Request& request) {
  if (request.backing.empty() || request.backing_format) return {};
  return fail(ErrorCode::invalid, "a backing file needs its format, raw, qcow2, qed or fvd: add --backing-format");
}

/// The new backing file, read-only, with its own chain. It must not stand on the image itself.
Result<OpenDisk> open_new_backing(const Request& request) {
  const std::string path = std::filesystem::path(directory_of(request.image)) / request.backing;
  OpenOptions options = request.options;
  options.read_only = true;
  options.cache = request.backing_cache;
  options.format = request.backing_format;
  options.allowed_directories.push_back(directory_of(request.image));
  IMG_LET(const bool circle, chain_contains(path, options, request.image));
  if (circle) return fail(ErrorCode::invalid, "{} is {}, or stands on it", path, request.image);
  return OpenDisk::open(path, options);
}

/// Copies into the image what would otherwise change.
Result<> keep_content(const Request& request, Io& io) {
  std::optional<OpenDisk> backing;
  if (!request.backing.empty()) {
    IMG_LET(OpenDisk opened, open_new_backing(request));
    backing.emplace(std::move(opened));
  }
  IMG_LET(OpenDisk overlay, OpenDisk::open(request.image, request.options));
  {
    ProgressBar bar(io, request.show);
    IMG_TRY(prepare_rebase(*overlay, backing ? &**backing : nullptr, bar.all()));
  }
  return overlay.close();
}

Result<> rebase(const Request& request, Io& io) {
  IMG_TRY(check(request));
  OpenOptions look = request.options;
  look.read_only = true;
  IMG_LET(const ImageInfo info, image_info(request.image, look));
  if (info.format == "raw")
    return fail(ErrorCode::unsupported, "{} is {}, which has no backing file", request.image, info.format);
  if (info.qcow2 && info.qcow2->data_file_raw && !request.backing.empty())
    return fail(ErrorCode::unsupported,
                "the data file of {} alone equals the disk, so there can be no backing file; \"imgfuse amend "
                "-o data_file_raw=off\" ends that",
                request.image);
  if (!request.unsafe) IMG_TRY(keep_content(request, io));
  return change_backing(request.image, request.backing, request.backing_format);
}

}  // namespace

int run_rebase(Io& io, Arguments args) {
  Request request;
  CommandLine line(
      "Gives an image another backing file. The disk reads as before: what would change is copied into the image "
      "first.",
      "imgfuse rebase");
  line.text("IMAGE", request.image).required();
  line.text("-b,--backing", request.backing, "The new backing file; \"\" for none. Relative to the image").required();
  line.text("-F,--backing-format", request.backing_format, "Its format: raw, qcow2, qed or fvd", "FORMAT");
  line.flag("-u,--unsafe", request.unsafe,
            "Change the name only, without looking at either file: for one that was moved or renamed");
  add_format_option(line, request.options.format);
  line.word("-t,--cache", request.options.cache, parse_cache_mode,
            "How the image is written: writeback (default) or none", "MODE");
  line.word("-T,--backing-cache", request.backing_cache, parse_cache_mode,
            "How the new backing file is read: writeback (default) or none", "MODE");
  add_allow_path_option(line, request.options.allowed_directories);
  add_progress_options(line, request.show);
  if (const auto status = line.parse(io, args)) return *status;

  if (auto rebased = rebase(request, io); !rebased) {
    print_error(io, request.image, rebased.error());
    return kFailure;
  }
  return kSuccess;
}

}  // namespace imgfuse::tool
