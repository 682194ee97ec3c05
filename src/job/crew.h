// A disk's content, dealt out in pieces to a few threads.
#pragma once

#include <deque>
#include <functional>
#include <optional>
#include <thread>
#include <vector>

#include "base/buffer.h"
#include "base/mutex.h"
#include "imgfuse/disk.h"
#include "imgfuse/job.h"

namespace imgfuse::job {

/// Longest piece of which something must be read. Longer ones leave the processor's cache between reading and writing.
inline constexpr uint64_t kPiece = uint64_t{1} << 20;

/// A stretch of the disk and what lies in it. Longer than the piece size only if it is one extent without data.
struct Piece {
  GuestRange range;
  std::vector<Extent> extents;  ///< cover the range
};

/// Where a disk is cut: at multiples of `size`, `phase` bytes before them.
struct Cuts {
  uint64_t size = kPiece;
  uint64_t phase = 0;
  GuestOffset next(GuestOffset at) const { return GuestOffset(((at.bytes() + phase) / size + 1) * size - phase); }
};

/// Cuts a range of a disk into pieces, in order. One thread.
class Cutter {
 public:
  Cutter(Disk& disk, GuestRange range, Cuts cuts) : disk_(disk), rest_(range), cuts_(cuts), known_(range.begin) {}

  /// Nothing at the end.
  Result<std::optional<Piece>> next();

 private:
  Result<> look_ahead();
  Result<Piece> take(uint64_t length);

  Disk& disk_;
  GuestRange rest_;
  const Cuts cuts_;
  std::deque<Extent> ahead_;  // cover [rest_.begin, known_)
  GuestOffset known_;
};

/// Runs work on pieces in threads of its own. The first failure ends it all: pieces that wait are dropped, those at
/// work are finished.
class Crew {
 public:
  /// Called by many threads at once. The buffer is the calling worker's own, for anything.
  using Work = std::function<Result<>(const Piece&, Buffer&)>;

  Crew(unsigned workers, Work work);
  ~Crew() { (void)finish(); }

  /// Blocks while enough pieces wait. False when something has failed, so that no more are wanted.
  bool add(Piece piece) EXCLUDES(mutex_);
  /// Waits until all work is done, and returns the first failure.
  Result<> finish() EXCLUDES(mutex_);
  /// The length of all pieces that are done.
  uint64_t done() const EXCLUDES(mutex_);

 private:
  void run() EXCLUDES(mutex_);
  std::optional<Piece> wait_for_piece() EXCLUDES(mutex_);
  void report(const Piece& piece, Result<> result) EXCLUDES(mutex_);

  const Work work_;
  const size_t max_waiting_;
  std::vector<std::thread> threads_;  // touched by the owner's thread only

  mutable Mutex mutex_;
  ConditionVariable changed_;
  std::deque<Piece> waiting_ GUARDED_BY(mutex_);
  bool closed_ GUARDED_BY(mutex_) = false;
  uint64_t done_ GUARDED_BY(mutex_) = 0;
  std::optional<Error> error_ GUARDED_BY(mutex_);
};

/// All of it together: `work` on every piece of the disk.
Result<> for_each_piece(Disk& disk, Cuts cuts, unsigned workers, const Progress& progress, const Crew::Work& work);

}  // namespace imgfuse::job
