// What is asked of a mirror from outside: its options, its status, and orders.
#include <array>
#include <bit>

#include "base/math.h"
#include "job/mirror_job.h"

namespace imgfuse::job {
namespace {

constexpr uint64_t kSmallestGranularity = 512;
constexpr uint64_t kLargestGranularity = uint64_t{64} << 20;
constexpr uint64_t kLargestBuffer = uint64_t{1} << 30;
constexpr unsigned kMostInFlight = 64;
/// Each takes some memory beside its content: less than 3 MiB together.
constexpr uint64_t kMostPieces = 65536;
/// Each of the bitmaps takes a bit.
constexpr uint64_t kMostGranules = uint64_t{1} << 32;

}  // namespace

const char* to_word(JobKind kind) {
  static constexpr std::array kWords = {"mirror", "backup", "stream", "commit"};
  return kWords[static_cast<size_t>(kind)];
}

Result<> check_options(const JobOptions& options, uint64_t size) {
  if (options.kind == JobKind::backup && options.sync == MirrorSync::none)
    return fail(ErrorCode::invalid, "a backup copies full or top, not what changes from now on");
  if (options.base && (options.kind == JobKind::mirror || options.kind == JobKind::backup))
    return fail(ErrorCode::invalid, "a {} has a target, and no base", to_word(options.kind));
  if (options.bitmap && options.kind != JobKind::backup)
    return fail(ErrorCode::invalid, "only a backup goes by a bitmap");
  if (options.bitmap && options.sync == MirrorSync::top)
    return fail(ErrorCode::invalid, "a bitmap says what is copied: sync top makes no sense beside it");
  const uint64_t granularity = options.granularity;
  if (!is_power_of_two(granularity) || granularity < kSmallestGranularity || granularity > kLargestGranularity)
    return fail(ErrorCode::invalid, "granularity {} is not a power of two between 512 and 64 MiB", granularity);
  if (size / granularity >= kMostGranules)
    return fail(ErrorCode::invalid, "granularity {} is too small for a disk of {} bytes: take {} or more", granularity,
                size, std::bit_ceil(divide_up(size, kMostGranules)));
  if (options.buffer > kLargestBuffer)
    return fail(ErrorCode::invalid, "a buffer of {} bytes is larger than {}", options.buffer, kLargestBuffer);
  if (options.buffer / granularity > kMostPieces)
    return fail(ErrorCode::invalid,
                "a buffer of {} bytes has {} pieces of {} bytes, more than {}: take a larger granularity",
                options.buffer, options.buffer / granularity, granularity, kMostPieces);
  if (options.in_flight < 1 || options.in_flight > kMostInFlight)
    return fail(ErrorCode::invalid, "{} operations in flight are not between 1 and {}", options.in_flight,
                kMostInFlight);
  return {};
}

JobStatus MirrorJob::status() const {
  const Lock lock(mutex_);
  JobStatus status{
      .id = id_, .kind = to_word(options_.kind), .target = options_.target, .state = state_, .error = error_};
  status.copied = engine_ ? engine_->copied() : copied_;
  status.remaining = engine_ ? engine_->remaining() : 0;
  status.rate = engine_ ? engine_->rate() : 0;
  if (engine_ && is_over(state_)) status.state = JobState::concluding;  // the disks are being closed
  return status;
}

Result<> MirrorJob::check_at_work() const {
  if (engine_ && !is_ending() && !is_over(state_)) return {};
  return fail(ErrorCode::invalid, "job {} is over", id_);
}

Result<> MirrorJob::pause() {
  const Lock lock(mutex_);
  IMG_TRY(check_at_work());
  if (state_ == JobState::concluding) return fail(ErrorCode::busy, "job {} is being concluded", id_);
  engine_->pause();
  set_state(JobState::paused);
  return {};
}

Result<> MirrorJob::resume() {
  const Lock lock(mutex_);
  IMG_TRY(check_at_work());
  if (state_ != JobState::paused) return fail(ErrorCode::invalid, "job {} is not paused", id_);
  error_.reset();
  engine_->resume();
  set_state(ready_ ? JobState::ready : JobState::running);
  work_.notify_all();
  return {};
}

Result<> MirrorJob::set_rate(uint64_t rate) {
  const Lock lock(mutex_);
  IMG_TRY(check_at_work());
  engine_->set_rate(rate);
  work_.notify_all();
  return {};
}

Result<> MirrorJob::cancel() {
  const Lock lock(mutex_);
  IMG_TRY(check_at_work());
  cancelled_ = true;
  changed_.notify_all();
  return {};
}

Result<> MirrorJob::end_when_ready(WhenReady end) {
  const Lock lock(mutex_);
  IMG_TRY(check_at_work());
  if (options_.kind != JobKind::mirror)
    return fail(ErrorCode::invalid, "job {} is a {}, which ends by itself", id_, to_word(options_.kind));
  when_ready_ = end;
  changed_.notify_all();
  return {};
}

}  // namespace imgfuse::job
