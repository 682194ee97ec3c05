#include "layer/switch.h"

#include <utility>

#include "base/no_wait.h"
#include "layer/forwarding.h"

namespace imgfuse::layer {

/// A snapshot that somebody has open.
class Switch::OpenSnapshot final : public Forwarding {
 public:
  OpenSnapshot(std::unique_ptr<Disk> disk, std::atomic<unsigned>& count)
      : Forwarding(*disk), disk_(std::move(disk)), count_(count) {
    ++count_;
  }

 private:
  Result<> do_close() override {
    const Result<> closed = below().close();
    --count_;
    return closed;
  }

  const std::unique_ptr<Disk> disk_;
  std::atomic<unsigned>& count_;
};

/// Those of the disk that is behind the switch at the time.
class Switch::SwitchedSnapshots final : public Snapshots {
 public:
  explicit SwitchedSnapshots(Switch& owner) : owner_(owner) {}

 private:
  /// Runs inside a visit.
  template <class Call>
  std::invoke_result_t<Call, Snapshots&> with(Call call) const {
    const SharedLock visit(owner_.door_);
    if (Snapshots* const snapshots = owner_.disk_->snapshots()) return call(*snapshots);
    return fail(ErrorCode::unsupported, "there are no snapshots in {} images", owner_.disk_->info().format);
  }

  Result<> apply(Snapshots& snapshots, const std::string& id_or_name) REQUIRES_SHARED(owner_.door_) {
    IMG_TRY(owner_.check_no_job("apply a snapshot"));
    IMG_TRY(snapshots.apply(id_or_name));
    owner_.size_ = owner_.disk_->size();
    return {};
  }

  Result<std::vector<SnapshotInfo>> list() const override {
    return with([](Snapshots& s) { return s.list(); });
  }
  Result<SnapshotInfo> create(const std::string& name) override {
    return with([&](Snapshots& s) { return s.create(name); });
  }
  Result<> apply(const std::string& id_or_name) override {
    return with([&](Snapshots& s) NO_THREAD_SAFETY_ANALYSIS { return apply(s, id_or_name); });
  }
  Result<> remove(const std::string& id_or_name) override {
    return with([&](Snapshots& s) { return s.remove(id_or_name); });
  }
  Result<std::unique_ptr<Disk>> open(const std::string& id_or_name) override {
    return with([&](Snapshots& s) -> Result<std::unique_ptr<Disk>> {
      IMG_LET(auto disk, s.open(id_or_name));
      return std::make_unique<OpenSnapshot>(std::move(disk), owner_.open_snapshots_);
    });
  }

  Switch& owner_;
};

class Switch::SwitchedBitmaps final : public Bitmaps {
 public:
  explicit SwitchedBitmaps(Switch& owner) : owner_(owner) {}

 private:
  template <class Call>
  std::invoke_result_t<Call, Bitmaps&> with(Call call) const {
    const SharedLock visit(owner_.door_);
    if (Bitmaps* const bitmaps = owner_.disk_->bitmaps()) return call(*bitmaps);
    return fail(ErrorCode::unsupported, "there are no bitmaps in {} images", owner_.disk_->info().format);
  }

  std::vector<BitmapInfo> list() const override {
    const SharedLock visit(owner_.door_);
    Bitmaps* const bitmaps = owner_.disk_->bitmaps();
    return bitmaps != nullptr ? bitmaps->list() : std::vector<BitmapInfo>();
  }
  Result<> add(const std::string& name, uint64_t granularity) override {
    return with([&](Bitmaps& b) { return b.add(name, granularity); });
  }
  Result<> remove(const std::string& name) override {
    return with([&](Bitmaps& b) { return b.remove(name); });
  }
  Result<> assign(const std::string& name, const std::vector<GuestRange>& changed) override {
    return with([&](Bitmaps& b) { return b.assign(name, changed); });
  }
  Result<std::vector<GuestRange>> changed(const std::string& name, GuestRange range) const override {
    return with([&](Bitmaps& b) { return b.changed(name, range); });
  }

  Switch& owner_;
};

class Switch::SwitchedCopy final : public BackgroundCopy {
 public:
  explicit SwitchedCopy(Switch& owner) : owner_(owner) {}

 private:
  Progress progress() const override {
    const SharedLock visit(owner_.door_);
    const BackgroundCopy* const copy = owner_.disk_->background_copy();
    return copy != nullptr ? copy->progress() : Progress();
  }

  Switch& owner_;
};

Switch::Switch(Disk& disk)
    : size_(disk.size()),
      snapshots_(std::make_unique<SwitchedSnapshots>(*this)),
      bitmaps_(std::make_unique<SwitchedBitmaps>(*this)),
      background_copy_(std::make_unique<SwitchedCopy>(*this)),
      disk_(&disk) {}

Switch::~Switch() = default;

Snapshots* Switch::snapshots() {
  const SharedLock visit(door_);
  return disk_->snapshots() != nullptr ? snapshots_.get() : nullptr;
}

Bitmaps* Switch::bitmaps() {
  const SharedLock visit(door_);
  return disk_->bitmaps() != nullptr ? bitmaps_.get() : nullptr;
}

BackgroundCopy* Switch::background_copy() {
  const SharedLock visit(door_);
  return disk_->background_copy() != nullptr ? background_copy_.get() : nullptr;
}

Result<> Switch::check_no_job(const char* change) const {
  if (job_.empty()) return {};
  return fail(ErrorCode::busy, "{}: {} runs on this disk", change, job_);
}

DiskInfo Switch::do_info() const {
  const SharedLock visit(door_);
  DiskInfo info = disk_->info();
  info.size = size_;
  return info;
}

DiskStatistics Switch::statistics() const {
  const SharedLock visit(door_);
  DiskStatistics statistics = disk_->statistics();
  statistics.reads = reads_.get();
  statistics.writes = writes_.get();
  statistics.zeroings = zeroings_.get();
  statistics.flushes = flushes_.get();
  return statistics;
}

/// The time before the door counts too, and what a request that must not wait is asked for again.
template <class Call>
Result<> Switch::counted(RequestCounter& counter, uint64_t bytes, Call call) {
  const NoWait* const hurried = NoWait::current();
  const auto begin = hurried != nullptr ? hurried->since() : std::chrono::steady_clock::now();
  const SharedLock visit(door_);
  Result<> result = call(*disk_);
  if (would_wait(result) && hurried) return result;
  counter.add(bytes, result.has_value(), std::chrono::steady_clock::now() - begin);
  return result;
}

Result<> Switch::do_read(GuestOffset offset, Bytes out) {
  return counted(reads_, out.size(), [&](Disk& disk) { return disk.read(offset, out); });
}

Result<> Switch::do_write(GuestOffset offset, ConstBytes data) {
  return counted(writes_, data.size(), [&](Disk& disk) { return disk.write(offset, data); });
}

Result<> Switch::do_write_zeroes(GuestRange range, Zeroing zeroing) {
  return counted(zeroings_, range.length, [&](Disk& disk) { return disk.write_zeroes(range, zeroing); });
}

Result<> Switch::do_populate(GuestRange range, Holes holes) {
  const SharedLock visit(door_);
  return disk_->populate(range, holes);
}

Result<> Switch::do_forget(GuestRange range) {
  const SharedLock visit(door_);
  return disk_->forget(range);
}

Result<std::vector<Extent>> Switch::do_map(GuestRange range, size_t max_extents) {
  const SharedLock visit(door_);
  return disk_->map(range, max_extents);
}

Result<> Switch::do_flush() {
  return counted(flushes_, 0, [&](Disk& disk) { return disk.flush(); });
}

Result<> Switch::do_resize(uint64_t size, ResizeOptions options) {
  const SharedLock visit(door_);
  IMG_TRY(check_no_job("resize"));
  IMG_TRY(disk_->resize(size, options));
  size_ = disk_->size();
  return {};
}

Result<> Switch::do_close() {
  const SharedLock visit(door_);
  return disk_->close();
}

uint64_t Switch::do_allocated() const {
  const SharedLock visit(door_);
  return disk_->allocated();
}

/// Takes long: outside the door.
Result<> Switch::do_count_allocated(const std::atomic<bool>& stop) {
  Disk* disk = nullptr;
  {
    const SharedLock visit(door_);
    const Lock lock(counting_mutex_);
    counting_ = disk = disk_;
  }
  const Result<> result = disk->count_allocated(stop);
  const Lock lock(counting_mutex_);
  counting_ = nullptr;
  counted_.notify_all();
  return result;
}

void Switch::wait_until_counted(const Disk& disk) {
  Lock lock(counting_mutex_);
  while (counting_ == &disk) counted_.wait(lock);
}

void Switch::wait_until_counted() {
  Lock lock(counting_mutex_);
  while (counting_ != nullptr) counted_.wait(lock);
}

bool Switch::is_counting() {
  const Lock lock(counting_mutex_);
  return counting_ != nullptr;
}

/// Who counts is not inside, but has been there.
Standstill::Standstill(Switch& of, Counting counting) NO_THREAD_SAFETY_ANALYSIS : switch_(of) {
  switch_.door_.lock();
  while (counting == Counting::has_ended && switch_.is_counting()) {
    switch_.door_.unlock();
    switch_.wait_until_counted();
    switch_.door_.lock();
  }
}

}  // namespace imgfuse::layer
