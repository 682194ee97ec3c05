// imgfuse bench: how fast is an image, without FUSE?
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "command_line.h"
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
  bool no_drain = false;
  CommandLine line("Measures how fast an image is read or written, without FUSE.", "imgfuse bench");
  line.text("IMAGE", request.image).required();
  line.number("-c,--count", bench.count, "Number of requests (default 75000)", "COUNT", 1, kMaxBenchCount);
  line.number("-d,--depth", bench.depth, "Requests at a time, each in a thread of its own (default 64)", "DEPTH", 1,
              kMaxBenchDepth);
  line.size("-s,--buffer-size", bench.length, "Length of a request (default 4k)");
  line.size("-S,--step-size", bench.step, "From one request to the next (default: the buffer size)");
  line.size("-o,--offset", bench.offset, "Where the first request lies, and no other before it");
  line.flag("-w,--write", bench.write, "Write: what the disk holds is lost");
  line.number("--pattern", bench.pattern, "The byte that is written, as a number (default 0)", "BYTE");
  line.number("--flush-interval", bench.flush_interval, "Flush after so many writes", "COUNT");
  line.flag("--no-drain", no_drain, "Go on writing while a flush is under way");
  line.word("-t,--cache", request.open.cache, parse_cache_mode,
            "How the image is accessed: writeback (default), none, writethrough, directsync or unsafe", "MODE");
  add_snapshot_option(line, request.open.snapshot);
  add_open_options(line, request.open);
  line.flag("-q,--quiet", request.quiet, "Say nothing but errors");
  add_json_option(line, request.json);
  if (const auto status = line.parse(io, args)) return *status;
  bench.drain = !no_drain;
  const Result<> done = run(io, request);
  io.out << std::flush;
  if (done) return kSuccess;
  print_error(io, request.image, done.error());
  return kFailure;
}

}  // namespace imgfuse::tool
