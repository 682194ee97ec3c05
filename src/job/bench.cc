// Many requests at once, and the time that they take.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <chrono>
#include <cstring>
#include <optional>
#include <system_error>
#include <thread>
#include <vector>

#include "base/buffer.h"
#include "base/math.h"
#include "base/mutex.h"
#include "imgfuse/job.h"

namespace imgfuse {
namespace {

/// Where request number i lies: steps from the offset on, and from it again behind the end of the disk.
class Places {
 public:
  Places(const BenchOptions& options, uint64_t size) : offset_(options.offset) {
    const uint64_t step = options.step == 0 ? options.length : options.step;
    const uint64_t last = size - options.length - options.offset;
    // Requests that are aligned stay so when they begin again.
    const uint64_t unit = uint64_t{1} << std::min(std::countr_zero(step), std::countr_zero(options.length));
    span_ = round_down(last, unit) + unit;
    step_ = step % span_;
  }
  GuestOffset operator()(uint64_t i) const {
    __extension__ using Wide = unsigned __int128;
    return GuestOffset(offset_ + static_cast<uint64_t>(Wide{i} * step_ % span_));
  }

 private:
  const uint64_t offset_;
  uint64_t span_, step_;
};

/// What the threads share. Requests go in rounds, between which all threads wait for each other; a round ends with a
/// flush.
class Bench {
 public:
  Bench(Disk& disk, const BenchOptions& options)
      : disk_(disk),
        options_(options),
        places_(options, disk.size()),
        round_(options.drain && options.flush_interval > 0 ? options.flush_interval : options.count),
        end_(std::min(round_, options.count)) {}

  Result<> run() {
    std::barrier together(options_.depth, [this]() noexcept { end_round(); });
    const auto work = [&] {
      Buffer buffer(options_.length);
      std::memset(buffer.data(), options_.pattern, buffer.size());
      do {
        for (uint64_t i = next_++; i < end_ && !failed_; i = next_++) note(request(i, buffer.bytes()));
        together.arrive_and_wait();
      } while (!done_);
    };
    std::vector<std::thread> threads;
    try {
      while (threads.size() + 1 < options_.depth) threads.emplace_back(work);
    } catch (const std::system_error& error) {
      note(fail(ErrorCode::io, "start thread {} of {}: {}", threads.size() + 2, options_.depth, error.what()));
      for (size_t i = threads.size() + 1; i < options_.depth; ++i) together.arrive_and_drop();
    }
    work();
    for (std::thread& thread : threads) thread.join();
    Lock lock(mutex_);
    return error_ ? Result<>(fail(*error_)) : Result<>{};
  }

 private:
  Result<> request(uint64_t i, Bytes bytes) {
    if (!options_.write) return disk_.read(places_(i), bytes);
    IMG_TRY(disk_.write(places_(i), bytes));
    const bool flush = !options_.drain && options_.flush_interval > 0 && (i + 1) % options_.flush_interval == 0;
    return flush ? disk_.flush() : Result<>{};
  }

  /// By one thread, while the others wait.
  void end_round() noexcept {
    if (options_.drain && options_.flush_interval > 0 && !failed_) note(disk_.flush());
    done_ = failed_ || end_ == options_.count;
    next_ = end_.load();
    end_ = std::min(end_ + round_, options_.count);
  }

  void note(Result<> result) EXCLUDES(mutex_) {
    if (result) return;
    failed_ = true;
    Lock lock(mutex_);
    if (!error_) error_ = std::move(result).error();
  }

  Disk& disk_;
  const BenchOptions options_;
  const Places places_;
  const uint64_t round_;  // requests

  std::atomic<uint64_t> next_ = 0;
  std::atomic<uint64_t> end_;  // of the round
  std::atomic<bool> done_ = false;
  std::atomic<bool> failed_ = false;
  Mutex mutex_;
  std::optional<Error> error_ GUARDED_BY(mutex_);
};

Result<> check(const BenchOptions& options, uint64_t size) {
  const auto outside = [](uint64_t value, uint64_t most) { return value == 0 || value > most; };
  if (outside(options.count, kMaxBenchCount))
    return fail(ErrorCode::invalid, "{} requests are not between 1 and {}", options.count, kMaxBenchCount);
  if (outside(options.depth, kMaxBenchDepth))
    return fail(ErrorCode::invalid, "a depth of {} is not between 1 and {}", options.depth, kMaxBenchDepth);
  if (outside(options.length, kMaxBenchMemory / options.depth))
    return fail(ErrorCode::invalid, "a buffer of {} bytes is not between 1 byte and {} bytes, at a depth of {}",
                options.length, kMaxBenchMemory / options.depth, options.depth);
  if (options.offset > size || options.length > size - options.offset)
    return fail(ErrorCode::invalid, "a request of {} bytes at {} lies past the end of the disk ({} bytes)",
                options.length, options.offset, size);
  if (options.flush_interval > 0 && !options.write) return fail(ErrorCode::invalid, "a flush interval is for writing");
  return {};
}

}  // namespace

Result<std::chrono::nanoseconds> bench(Disk& disk, const BenchOptions& options) {
  IMG_TRY(check(options, disk.size()));
  Bench bench(disk, options);
  const auto begin = std::chrono::steady_clock::now();
  IMG_TRY(bench.run());
  return std::chrono::steady_clock::now() - begin;
}

}  // namespace imgfuse
