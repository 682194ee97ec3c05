// What a mirror copies next. It does no I/O, has no threads and no clock.
#pragma once

#include <algorithm>
#include <boost/intrusive/list.hpp>
#include <chrono>
#include <cstdint>
#include <deque>
#include <vector>

#include "base/buffer.h"
#include "core/bitmap.h"
#include "imgfuse/units.h"

namespace imgfuse::job {

using Time = std::chrono::steady_clock::time_point;

struct MirrorShape {
  uint64_t size = 0;             ///< of the disk, in bytes
  uint64_t granularity = 65536;  ///< bytes per bit, a power of two
  uint64_t buffer = 0;           ///< bytes of memory for what is on its way
  unsigned in_flight = 16;       ///< operations at a time
  /// Cluster size of a target that has nothing below it to fill the rest of a cluster from: the first operation on each
  /// cluster takes all of it. A multiple of the granularity if it is larger; 0: no need to.
  uint64_t whole_clusters = 0;

  /// The buffer holds a granule and a cluster at least.
  uint64_t smallest_buffer() const { return std::max(granularity, whole_clusters); }
};

/// Knows which granules differ (dirty), which are on their way, and which memory is free:
///
///     mark() ─► dirty ─► start() ─► in flight ─► finished() ─► alike
///                 ▲                     │ failed
///                 └─────────────────────┘
///
/// A granule that is marked while it is in flight is dirty again, and is not copied a second time before the first copy
/// has ended. The caller marks a change after it was made and before anybody relies on it. One thread at a time.
class MirrorEngine {
 public:
  explicit MirrorEngine(const MirrorShape& shape);
  const MirrorShape& shape() const { return shape_; }

  /// One copy on its way.
  class Operation : public boost::intrusive::list_base_hook<> {
   public:
    GuestRange range() const { return range_; }
    /// Where it has room for the content: pieces that together are at least as long as the range.
    const std::vector<Bytes>& memory() const { return memory_; }

   private:
    friend class MirrorEngine;
    struct Piece : boost::intrusive::list_base_hook<> {
      std::byte* memory = nullptr;
    };
    GuestRange range_;
    std::vector<Bytes> memory_;
    boost::intrusive::list<Piece> pieces_;
  };

  /// Every granule that the range touches differs.
  void mark(GuestRange range);
  /// The granules that lie in the range as a whole need no copying. Those on their way are left alone.
  void unmark(GuestRange range);
  /// The next operation; null if nothing is dirty, or if it has to wait: for earlier operations to end, for resume(),
  /// or for wake_at().
  Operation* start(Time now);
  /// Who is about to change a range wants what is dirty in it copied before.
  struct Claim {
    Operation* operation = nullptr;  ///< to be done first, and to be finished(); then ask again
    bool wait = false;               ///< ask again when an operation has ended
  };
  /// Neither pause() nor the rate hold it up. An empty claim: nothing in the range is left.
  Claim claim(GuestRange range, Time now);
  /// What is in the range has been copied, or is dirty again.
  void finished(Operation& operation, bool copied);

  /// Somebody writes to both sides himself.
  enum class Entry {
    wait,  ///< an operation is on its way there: ask again when one has ended
    both,  ///< leave() must follow
    mark,  ///< only the source is to be written, and marked
  };
  Entry enter(GuestRange range);
  /// `alike`: both sides have what was written.
  void leave(GuestRange range, bool alike);

  void pause() { paused_ = true; }
  void resume() { paused_ = false; }
  /// Bytes per second; 0: no limit.
  void set_rate(uint64_t rate);
  uint64_t rate() const { return rate_; }
  /// Nothing starts before.
  void hold_until(Time time) { hold_until_ = time; }
  /// When start() may succeed though it did not, if nothing else happens.
  Time wake_at() const { return std::max(allowed_at_, hold_until_); }

  unsigned in_flight() const { return running_; }
  /// Bytes that are dirty or in an operation, of the disk's last granule those that there are. Who writes to both sides
  /// himself does not count, however many there are.
  uint64_t remaining() const;
  uint64_t copied() const { return copied_; }

 private:
  using Piece = Operation::Piece;
  struct Granules {
    uint64_t begin = 0;
    uint64_t end = 0;
  };
  Granules touched(GuestRange range) const;
  GuestRange range_of(Granules granules) const;
  Granules next_run(uint64_t from, uint64_t to) const;
  Granules widen(Granules run) const;
  bool find_run(Granules& run) const;
  Operation* begin(Granules run, Time now);
  void take_memory(Operation& operation, uint64_t pieces);
  void remember_clusters(GuestRange range);
  uint64_t cluster_of(uint64_t granule) const { return granule / granules_per_cluster_; }

  const MirrorShape shape_;
  const uint64_t granules_;
  const uint64_t granules_per_cluster_;  // 0: operations are not widened
  const uint64_t longest_;               // granules in one operation, whole clusters

  Bitmap dirty_;
  Bitmap in_flight_;
  Bitmap whole_;  // clusters of the target that were written as a whole
  uint64_t cursor_ = 0;

  Buffer buffer_;
  std::vector<Piece> pieces_;
  boost::intrusive::list<Piece> free_;  // by address, so that what is taken together lies together
  std::deque<Operation> operations_;
  boost::intrusive::list<Operation> idle_;

  unsigned running_ = 0;
  uint64_t on_their_way_ = 0;  // bytes, of the operations that run
  bool paused_ = false;
  uint64_t rate_ = 0;
  Time allowed_at_;  // by the rate
  Time hold_until_;
  uint64_t copied_ = 0;
};

}  // namespace imgfuse::job
