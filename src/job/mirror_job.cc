#include "job/mirror_job.h"

#include <time.h>

#include <algorithm>
#include <utility>

#include "base/log.h"
#include "base/math.h"
#include "job/mirror_changes.h"

namespace imgfuse::job {
namespace {

constexpr std::chrono::milliseconds kFirstPause(1);
constexpr std::chrono::milliseconds kLongestPause(1000);

/// A backup takes no whole clusters: it copies all that there is in any case, and what it need not copy may have
/// changed.
MirrorShape shape_of(const JobOptions& options, uint64_t size, const Disk& target, bool has_backing) {
  MirrorShape shape{
      .size = size, .granularity = options.granularity, .buffer = options.buffer, .in_flight = options.in_flight};
  const uint64_t cluster = target.info().cluster_size;
  const bool has_larger = cluster > options.granularity && cluster % options.granularity == 0;
  if (!has_backing && options.kind == JobKind::mirror && has_larger) shape.whole_clusters = cluster;
  shape.buffer = round_up(std::max(shape.buffer, shape.smallest_buffer()), shape.granularity);
  return shape;
}

WhenReady end_of(const JobOptions& options) {
  if (options.kind == JobKind::mirror) return options.when_ready;
  return options.kind == JobKind::backup ? WhenReady::finish : WhenReady::complete;
}

/// A disk that is closed while its users wait must not be counted either.
layer::Counting counting_at_end(JobKind kind) {
  const bool closes = kind == JobKind::stream || kind == JobKind::commit;
  return closes ? layer::Counting::has_ended : layer::Counting::may_go_on;
}

/// How long the calling thread has been at something.
class Spell {
 public:
  /// It was so for three quarters of the time: what waits for a lock or for its turn on a busy CPU does not count.
  bool was_spent_waiting() const { return 4 * (cpu_time() - cpu_begin_) < now() - begin_; }

 private:
  static std::chrono::nanoseconds cpu_time() {
    timespec time = {};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
  }

  const Time begin_ = now();
  const std::chrono::nanoseconds cpu_begin_ = cpu_time();
};

}  // namespace

MirrorJob::MirrorJob(uint64_t id, const JobOptions& options, Sides sides)
    : id_(id),
      options_(options),
      cpus_(std::max(1u, std::thread::hardware_concurrency())),
      sides_(std::move(sides)),
      target_(sides_.target ? *sides_.target : sides_.source),
      changes_(std::make_unique<Changes>(*this)),
      when_ready_(end_of(options)) {
  engine_.emplace(shape_of(options_, sides_.source.size(), target_, sides_.target_has_backing));
  engine_->set_rate(options.rate);
}

MirrorJob::~MirrorJob() { join(); }

Result<> MirrorJob::start() {
  {
    layer::Standstill standstill(sides_.through);
    if (const auto marked = mark_first(); !marked) {
      (void)target_.close();
      return marked;
    }
    if (options_.kind != JobKind::stream) standstill.set_disk(*changes_);
    standstill.set_job(std::string("a ") + to_word(options_.kind));
  }
  thread_ = std::thread([this] { run(); });
  return {};
}

/// What a backup has to copy unless the survey finds that it need not.
Result<> MirrorJob::mark_first() {
  if (!is_backup()) return {};
  std::vector<GuestRange> first = {{GuestOffset(0), sides_.source.size()}};
  if (options_.bitmap) {
    IMG_LET(increment_, Increment::begin(sides_.source, *options_.bitmap, options_.granularity));
    IMG_LET(first, increment_->changed());
  }
  const Lock lock(mutex_);
  for (const GuestRange range : first) engine_->mark(range);
  return {};
}

void MirrorJob::join() {
  if (thread_.joinable()) thread_.join();
}

void MirrorJob::run() {
  if (survey()) serve();
  close_down();
}

/// False if the job is to end.
bool MirrorJob::survey() {
  const auto mark = [this](GuestRange range) {
    const Lock lock(mutex_);
    is_backup() ? engine_->unmark(range) : engine_->mark(range);
  };
  Survey survey(sides_.source, target_, {options_.sync, options_.target_is_zero, options_.kind, sides_.layers}, mark);
  for (bool more = true; more;) {
    {
      Lock lock(mutex_);
      while (state_ == JobState::paused && !is_ending()) changed_.wait(lock);
      if (is_ending()) return false;
    }
    if (const auto looked = survey.step()) {
      more = *looked;
    } else if (!try_again(looked.error())) {
      return false;
    }
  }
  const Lock lock(mutex_);
  surveyed_ = true;
  first_copy_ = engine_->remaining();
  return !is_ending();
}

/// What is left then is copied at once when the job ends: not what it has never come to, which the rate is for.
bool MirrorJob::is_near() const {
  if (is_finite()) return engine_->remaining() == 0;
  return engine_->copied() >= first_copy_ && engine_->remaining() <= engine_->shape().buffer;
}

/// After an error outside of the operations: false if that was the end.
bool MirrorJob::try_again(const Error& error) {
  Lock lock(mutex_);
  failed(error);
  while (!is_ending() && (state_ == JobState::paused || now() < retry_at_)) {
    if (state_ == JobState::paused)
      changed_.wait(lock);
    else
      changed_.wait_until(lock, retry_at_);
  }
  return !is_ending();
}

void MirrorJob::serve() {
  for (unsigned i = 0; i < options_.in_flight; ++i) workers_.emplace_back([this] { copy(); });
  while (wait_for_end())
    if (conclude()) break;
  {
    const Lock lock(mutex_);
    dismissed_ = true;
    work_.notify_all();
  }
  for (std::thread& worker : workers_) worker.join();
}

/// True when the sides are to be made alike for the last time.
bool MirrorJob::wait_for_end() {
  Lock lock(mutex_);
  for (;;) {
    if (is_ending()) return false;
    if (is_near() && !ready_) {
      ready_ = true;
      if (state_ == JobState::running) set_state(JobState::ready);
    }
    const bool wanted = ready_ && state_ != JobState::paused && when_ready_ != WhenReady::wait;
    if (wanted && now() >= retry_at_) return true;
    if (wanted)
      changed_.wait_until(lock, retry_at_);
    else
      changed_.wait(lock);
  }
}

/// True if the job is over, in whatever way. A copy is to have all that was written. The long flush comes before the
/// disk stands still.
bool MirrorJob::conclude() {
  {
    const Lock lock(mutex_);
    if (state_ == JobState::ready) set_state(JobState::concluding);
  }
  const bool copies_end = options_.kind == JobKind::mirror;
  if (const auto settled = copies_end ? sides_.hooks.settle() : Result<>(); !settled)
    return !try_again(settled.error());
  if (const auto flushed = target_.flush(); !flushed) return !try_again(flushed.error());
  layer::Standstill standstill(sides_.through, counting_at_end(options_.kind));
  if (!drain() || !may_part(standstill)) return false;
  if (const auto flushed = target_.flush(); !flushed) {
    const Lock lock(mutex_);
    failed(flushed.error().during("flush {}", options_.target));
    return false;
  }
  part(standstill);
  return true;
}

/// Nobody changes the disk: when the last operation has ended, both sides are alike.
bool MirrorJob::drain() {
  Lock lock(mutex_);
  const uint64_t rate = engine_->rate();
  engine_->set_rate(0);
  engine_->hold_until({});
  draining_ = true;
  work_.notify_all();
  while (engine_->remaining() > 0 && state_ == JobState::concluding && !cancelled_) changed_.wait(lock);
  draining_ = false;
  engine_->set_rate(rate);
  return engine_->remaining() == 0 && state_ == JobState::concluding && !cancelled_;
}

bool MirrorJob::may_part(const layer::Standstill& standstill) {
  const Lock lock(mutex_);
  if (when_ready_ != WhenReady::complete || !standstill.has_open_snapshots()) return true;
  error_ = Error(ErrorCode::busy, "the file of a snapshot is open: close it, and resume the job then");
  engine_->pause();
  set_state(JobState::paused);
  return false;
}

void MirrorJob::part(layer::Standstill& standstill) {
  bool complete = false;
  {
    const Lock lock(mutex_);
    complete = when_ready_ == WhenReady::complete;
  }
  Result<> result = increment_ ? reset_bitmap() : Result<>();
  if (complete) {
    auto left = sides_.complete(standstill, std::move(sides_.target));
    if (left)
      unused_ = std::move(*left);
    else
      result = fail(left.error());
    standstill.set_job("");
    parted_ = replaced_ = true;
  } else {
    leave(standstill);
  }
  const Lock lock(mutex_);
  error_.reset();  // what was to be ignored
  if (!result) error_ = result.error();
  set_state(!result ? JobState::failed : complete ? JobState::completed : JobState::finished);
}

/// The target is safe when it is closed.
Result<> MirrorJob::reset_bitmap() {
  IMG_TRY(std::exchange(sides_.target, nullptr)->close());
  return increment_->reset();
}

void MirrorJob::leave(layer::Standstill& standstill) {
  unused_ = sides_.leave(standstill, std::move(sides_.target));
  standstill.set_job("");
  parted_ = true;
}

/// More operations than CPUs help only if they wait for the host. Where all is in its memory they would keep each other
/// from the file's lock, and their buffers out of the CPUs' caches.
bool MirrorJob::keeps_cpus_busy() const { return !copies_wait_ && engine_->in_flight() >= cpus_; }

/// A worker.
void MirrorJob::copy() {
  Lock lock(mutex_);
  while (!dismissed_) {
    const bool wanted = !is_ending() && !keeps_cpus_busy();
    MirrorEngine::Operation* const operation = wanted ? engine_->start(now()) : nullptr;
    if (operation == nullptr) {
      wait_for_work(lock);
      continue;
    }
    if (idle_ > 0 && !keeps_cpus_busy()) work_.notify_one();  // who wakes the next one
    lock.unlock();
    const Spell spell;
    const Result<> copied = copy(*operation);
    const bool waited = spell.was_spent_waiting();
    lock.lock();
    copies_wait_ = waited;
    engine_->finished(*operation, copied.has_value());
    if (copied)
      failures_ = 0;
    else
      failed(copied.error());
    if (waiting_ > 0 || (!ready_ && is_near()) || (draining_ && engine_->remaining() == 0)) changed_.notify_all();
  }
}

Result<> MirrorJob::copy(const MirrorEngine::Operation& operation) {
  if (options_.kind == JobKind::stream) return fill_range(target_, operation.range(), sides_.layers);
  const uint32_t layers = options_.kind == JobKind::commit ? sides_.layers : UINT32_MAX;
  return copy_range(sides_.source, target_, operation.range(), operation.memory(), layers);
}

void MirrorJob::wait_for_work(Lock& lock) {
  const Time wake_at = engine_->wake_at();
  if (wake_at > now() && engine_->remaining() > 0 && state_ != JobState::paused) return work_.wait_until(lock, wake_at);
  ++idle_;
  work_.wait(lock);
  --idle_;
}

void MirrorJob::failed(const Error& error) {
  error_ = error;
  const bool no_space = error.code() == ErrorCode::no_space;
  if (options_.on_error == OnError::ignore) {
    failures_ = std::min(failures_ + 1, 16u);
    retry_at_ = now() + std::min(kFirstPause * (1 << failures_), kLongestPause);
    engine_->hold_until(retry_at_);
    if (state_ == JobState::concluding) set_state(JobState::ready);
  } else if (options_.on_error == OnError::stop || (options_.on_error == OnError::enospc && no_space)) {
    engine_->pause();
    if (!is_ending()) set_state(JobState::paused);
  } else {
    set_state(JobState::failed);
  }
  changed_.notify_all();
}

void MirrorJob::set_state(JobState state) {
  state_ = state;
  changed_.notify_all();
}

/// The disks that are not in use any more are closed. The target of a job that failed stays as it is.
void MirrorJob::close_down() {
  JobState end = JobState::cancelled;
  {
    const Lock lock(mutex_);
    if (state_ == JobState::failed || is_over(state_)) end = state_;
  }
  if (!parted_) {
    layer::Standstill standstill(sides_.through, counting_at_end(options_.kind));
    leave(standstill);
  }
  if (replaced_) sides_.hooks.replaced();
  sides_.through.wait_until_counted(*changes_);
  Result<> closed;
  if (unused_) {
    sides_.through.wait_until_counted(*unused_);
    const std::string name = unused_->info().name;
    closed = std::exchange(unused_, nullptr)->close();
    if (!closed) closed = fail(closed.error().during("close {}", name));
  }
  if (!closed) log_error("{}", closed.error().text());

  const Lock lock(mutex_);
  if (!closed) error_ = closed.error();
  if (!closed && end == JobState::finished) end = JobState::failed;
  copied_ = engine_->copied();
  engine_.reset();
  set_state(end);
}

}  // namespace imgfuse::job
