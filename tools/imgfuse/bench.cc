// imgfuse bench: how fast is an image, without FUSE?
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "command.h"
#include "imgfuse/job.h"
#include "open_disk.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

struct BenchRequest {
  std::string image;
  OpenOptions open;
  BenchOptions bench;
  bool json = false;
  bool quiet = false;
};

std::string text_of(const BenchOptions& bench) {
  std::string text =
      fmt::format("Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})\n",
                  bench.count, bench.write ? "write" : "read", bench.length, bench.depth, bench.offset,
                  bench.step == 0 ? bench.length : bench.step);
  if (bench.flush_interval > 0) text += fmt::format("Sending flush every {} requests\n", bench.flush_interval);
  return text;
}

void print_result(Io& io, const BenchRequest& request, std::chrono::nanoseconds time) {
  const BenchOptions& bench = request.bench;
  const double seconds = std::max(std::chrono::duration<double>(time).count(), 1e-9);
  const double requests_a_second = static_cast<double>(bench.count) / seconds;
  const double bytes_a_second = requests_a_second * static_cast<double>(bench.length);
  if (request.json) {
    const nlohmann::ordered_json json = {{"image", request.image},
                                         {"write", bench.write},
                                         {"count", bench.count},
                                         {"depth", bench.depth},
                                         {"buffer-size", bench.length},
                                         {"step-size", bench.step == 0 ? bench.length : bench.step},
                                         {"offset", bench.offset},
                                         {"flush-interval", bench.flush_interval},
                                         {"seconds", seconds},
                                         {"iops", requests_a_second},
                                         {"bytes-per-second", bytes_a_second}};
    io.out << json.dump(4, ' ', false, nlohmann::ordered_json::error_handler_t::replace) << '\n';
  } else if (!request.quiet) {
    io.out << text_of(bench)
           << fmt::format("Run completed in {:.3f} seconds.\n{:.0f} requests and {:.1f} MB per second.\n", seconds,
                          requests_a_second, bytes_a_second / 1e6);
  }
}

Result<> run(Io& io, BenchRequest& request) {
  request.open.read_only = !request.bench.write;
  if (request.bench.write && request.open.force_share)
    return fail(ErrorCode::invalid, "--force-share takes no locks and is for reading");
  if (request.bench.write && request.open.snapshot) return fail(ErrorCode::invalid, "a snapshot can only be read");
  IMG_LET(OpenDisk disk, OpenDisk::open(request.image, request.open));
  if (request.bench.write && disk->info().read_only)
    return fail(ErrorCode::read_only, "{} can only be read", request.image);
  IMG_LET(const auto time, bench(*disk, request.bench));
  IMG_TRY(disk.close());
  print_result(io, request, time);
  return {};
}

}  // namespace

int run_bench(Io& io, Arguments args) {
  BenchRequest request;
  BenchOptions& bench = request.bench;
  unsigned pattern = 0;
  bool no_drain = false;
  CLI::App app("Measures how fast an image is read or written, without FUSE.", "imgfuse bench");
  app.add_option("IMAGE", request.image)->required();
  app.add_option("-c,--count", bench.count, "Number of requests (default 75000)")->type_name("COUNT");
  app.add_option("-d,--depth", bench.depth, "Requests at a time, each in a thread of its own (default 64)")
      ->type_name("DEPTH");
  add_size_option(app, "-s,--buffer-size", bench.length, "Length of a request (default 4k)");
  add_size_option(app, "-S,--step-size", bench.step, "From one request to the next (default: the buffer size)");
  add_size_option(app, "-o,--offset", bench.offset, "Where the first request lies, and no other before it");
  app.add_flag("-w,--write", bench.write, "Write: what the disk holds is lost");
  app.add_option("--pattern", pattern, "The byte that is written, as a number (default 0)")
      ->check(CLI::Range(0, 255))
      ->type_name("BYTE");
  app.add_option("--flush-interval", bench.flush_interval, "Flush after so many writes")->type_name("COUNT");
  app.add_flag("--no-drain", no_drain, "Go on writing while a flush is under way");
  add_cache_option(app, "-t,--cache", request.open.cache,
                   "How the image is accessed: writeback (default), none, writethrough, directsync or unsafe");
  add_snapshot_option(app, request.open.snapshot);
  add_open_options(app, request.open);
  app.add_flag("-q,--quiet", request.quiet, "Say nothing but errors");
  add_json_option(app, request.json);
  if (const auto status = parse(app, io, args)) return *status;
  bench.pattern = static_cast<uint8_t>(pattern);
  bench.drain = !no_drain;
  const Result<> done = run(io, request);
  io.out << std::flush;
  if (done) return kSuccess;
  print_error(io, request.image, done.error());
  return kFailure;
}

}  // namespace imgfuse::tool
