#include "layer/copying_disk.h"

#include <algorithm>
#include <cassert>
#include <random>

#include "base/buffer.h"
#include "base/log.h"

namespace imgfuse {
namespace {

class SteadyClock final : public CopyClock {
 public:
  Milliseconds now() override { return std::chrono::steady_clock::now().time_since_epoch(); }
  void wait(Milliseconds time) override {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, time, [this] { return interrupted_; });
  }
  void interrupt() override {
    const std::lock_guard lock(mutex_);
    interrupted_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool interrupted_ = false;
};

uint64_t below(uint64_t n) {
  static thread_local std::mt19937_64 engine(std::random_device{}());
  return std::uniform_int_distribution<uint64_t>(0, n - 1)(engine);
}

/// Images say what they like.
constexpr uint64_t kMostOutstanding = uint64_t{256} << 20;
constexpr uint32_t kSmallestPiece = 512, kLargestPiece = 16 << 20;
constexpr uint64_t kHoleStep = uint64_t{1} << 30;

CopyOptions complete(CopyOptions options) {
  if (!options.random) options.random = below;
  CopySettings& settings = options.settings;
  settings.max_outstanding_copy_on_read = std::min(settings.max_outstanding_copy_on_read, kMostOutstanding);
  settings.bytes_per_prefetch = std::clamp(settings.bytes_per_prefetch, kSmallestPiece, kLargestPiece);
  settings.average_alpha = std::min(settings.average_alpha, 100u);
  return options;
}

}  // namespace

std::unique_ptr<CopyClock> CopyClock::steady() { return std::make_unique<SteadyClock>(); }

CopyingDisk::CopyingDisk(std::unique_ptr<Disk> disk, CopyOptions options, std::unique_ptr<CopyClock> clock)
    : Forwarding(*disk), disk_(std::move(disk)), options_(complete(std::move(options))), clock_(std::move(clock)) {
  if (options_.settings.copy_on_read) on_read_ = std::thread([this] { copy_noted(); });
  if (options_.everything) everything_ = std::thread([this] { copy_everything(); });
}

CopyingDisk::~CopyingDisk() { stop(); }

void CopyingDisk::stop() {
  stopping_ = true;
  clock_->interrupt();
  {
    Lock lock(mutex_);
    changed_.notify_all();
  }
  if (on_read_.joinable()) on_read_.join();
  if (everything_.joinable()) everything_.join();
}

Result<> CopyingDisk::do_close() {
  stop();
  return disk_->close();
}

// ---- What is read

Result<> CopyingDisk::do_read(GuestOffset offset, Bytes out) {
  IMG_TRY(disk_->read(offset, out));
  if (options_.settings.copy_on_read) note_read({offset, out.size()});
  return {};
}

void CopyingDisk::note_read(GuestRange range) {
  Lock lock(mutex_);
  if (waiting_ + range.length > options_.settings.max_outstanding_copy_on_read) {
    progress_.skipped_on_read += range.length;
    return;
  }
  waiting_ += range.length;
  noted_.push_back(range);
  changed_.notify_all();
}

/// The first part of the range that comes from a layer below; empty: none. Tables only are read for this.
Result<Extent> CopyingDisk::next_below(GuestRange range) {
  while (!range.empty()) {
    IMG_LET(const std::vector<Extent> extents, disk_->map(range));
    for (const Extent& extent : extents)
      if (extent.depth > 0) return extent;
    if (extents.empty()) break;
    const GuestOffset end = extents.back().range.end();
    range = {end, range.end() - end};
    if (stopping_) break;
  }
  return Extent{.range = {range.begin, 0}};
}

void CopyingDisk::copy_noted() {
  for (;;) {
    GuestRange range;
    {
      Lock lock(mutex_);
      while (noted_.empty() && !stopping_) changed_.wait(lock);
      if (stopping_) return;
      range = noted_.front();
      noted_.pop_front();
    }
    uint64_t copied = 0;
    Result<> result;
    for (GuestRange left = range; result && !left.empty() && !stopping_;) {
      const Result<Extent> next = next_below(left);
      if (!next) {
        result = fail(next.error());
      } else if (next->range.empty()) {
        break;
      } else {
        const GuestRange part = next->range;
        result = disk_->populate(part, Holes::keep);
        copied += part.length;
        left = {part.end(), left.end() - part.end()};
      }
    }
    if (!result) log_warning("copy what was read: {}", result.error().text());
    Lock lock(mutex_);
    waiting_ -= range.length;
    progress_.copied_on_read += copied;
    changed_.notify_all();
  }
}

void CopyingDisk::wait_idle() {
  Lock lock(mutex_);
  while (waiting_ > 0) changed_.wait(lock);
}

// ---- Everything

/// One piece; false when nothing is left.
Result<bool> CopyingDisk::copy_piece(GuestOffset& cursor, Pace& pace) {
  const uint64_t size = disk_->size();
  if (cursor.bytes() >= size) return false;
  IMG_LET(const Extent extent, next_below({cursor, size - cursor.bytes()}));
  if (extent.range.empty()) return false;
  if (extent.kind != ExtentKind::data) return pass_hole(extent.range, cursor);
  const GuestRange next{extent.range.begin,
                        std::min<uint64_t>(extent.range.length, options_.settings.bytes_per_prefetch)};
  const Milliseconds pause = pace.wait(clock_->now(), next.length);
  if (pause.count() > 0) {
    set_state(State::pausing);
    clock_->wait(pause);
    set_state(State::running);
    if (stopping_) return false;
  }
  // Read by itself, where the two speeds are to be told apart; populating reads again what the host has just cached.
  const Milliseconds begun = clock_->now();
  if (pace.measures()) {
    Buffer content(next.length);
    IMG_TRY(disk_->read(next.begin, content.bytes()));
  }
  const Milliseconds read = clock_->now();
  IMG_TRY(disk_->populate(next, Holes::keep));
  pace.add_read(next.length, read - begun);
  pace.add_write(next.length, clock_->now() - read);
  cursor = next.end();
  return true;
}

/// Holes move no data and are not paced. They come in steps, since stopping waits for one.
Result<bool> CopyingDisk::pass_hole(GuestRange hole, GuestOffset& cursor) {
  hole.length = std::min(hole.length, kHoleStep);
  IMG_TRY(disk_->populate(hole, Holes::keep));
  cursor = hole.end();
  return true;
}

void CopyingDisk::copy_everything() {
  {
    Lock lock(mutex_);
    progress_.state = State::waiting;
    progress_.total = disk_->size();
  }
  if (options_.settings.start_delay > 0) clock_->wait(Milliseconds(options_.settings.start_delay * 1000.0));
  set_state(State::running);
  Pace pace(options_.settings, options_.rate, options_.random);
  GuestOffset cursor(0);
  for (bool more = true; more && !stopping_;) {
    Result<bool> copied = copy_piece(cursor, pace);
    if (!copied) {
      log_warning("copying the backing file has ended: {}", copied.error().text());
      return set_state(State::failed);
    }
    more = *copied;
    Lock lock(mutex_);
    progress_.done = cursor.bytes();
    progress_.total = disk_->size();
  }
  if (stopping_) return set_state(State::off);
  // Now an image may leave its backing file.
  const Result<> flushed = disk_->flush();
  if (!flushed) return set_state(State::failed);
  Lock lock(mutex_);
  progress_.done = progress_.total = disk_->size();
  progress_.state = State::finished;
  changed_.notify_all();
}

void CopyingDisk::set_state(State state) {
  Lock lock(mutex_);
  progress_.state = state;
  changed_.notify_all();
}

BackgroundCopy::Progress CopyingDisk::progress() const {
  Lock lock(mutex_);
  return progress_;
}

}  // namespace imgfuse
