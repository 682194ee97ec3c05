// New host clusters: the file's end moves.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "base/latch.h"
#include "base/mutex.h"
#include "format/qed/image.h"

namespace imgfuse::qed {

class Allocator;

/// Host clusters that read as zeros and that nobody points at. Given back unless committed.
class [[nodiscard]] Reservation {
 public:
  Reservation(Reservation&& other) noexcept : owner_(std::exchange(other.owner_, nullptr)), range_(other.range_) {}
  Reservation& operator=(Reservation&&) = delete;
  ~Reservation();

  HostRange range() const { return range_; }
  HostOffset host() const { return range_.begin; }
  /// They are pointed at from now on.
  void commit() { owner_ = nullptr; }

 private:
  friend class Allocator;
  Reservation(Allocator& owner, HostRange range) : owner_(&owner), range_(range) {}
  Allocator* owner_;
  const HostRange range_;
};

/// The length of the file is all that QED records about what is in use. Clusters are handed out once, at the end of the
/// file, which grows by them at once: so they read as zeros, and an entry that points at them is valid. Those that come
/// back because a request failed are handed out again, or cut off at the end.
///
/// Any thread; calls may block. The mutex (rank 3) is held while the file's length changes.
class Allocator {
 public:
  explicit Allocator(Image& image) : image_(image) {}

  /// Clusters go behind what is in the file, whole clusters only.
  void start(HostOffset end) EXCLUDES(mutex_);
  /// `bytes` of neighbouring clusters.
  Result<Reservation> reserve(uint64_t bytes) EXCLUDES(mutex_);
  /// Cuts off what came back and lies at the end of the file. Returns whether the file changed.
  Result<bool> trim() EXCLUDES(mutex_);

 private:
  friend class Reservation;
  void give_back(HostRange range) EXCLUDES(mutex_);
  Result<bool> cut_free_end() REQUIRES(mutex_);
  Result<> resize(HostOffset end) REQUIRES(mutex_);

  Image& image_;
  Mutex mutex_{LockRank::search};
  HostOffset end_ GUARDED_BY(mutex_);  // of the last cluster handed out
  std::vector<HostRange> free_ GUARDED_BY(mutex_);
};

}  // namespace imgfuse::qed
