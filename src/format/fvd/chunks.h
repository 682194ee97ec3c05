// Which chunks of the data file are free, and making room for more.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "base/mutex.h"
#include "core/range_lock.h"
#include "core/range_set.h"
#include "format/fvd/header.h"
#include "imgfuse/storage.h"

namespace imgfuse::fvd {

/// What a look at all table entries finds.
struct TableSurvey {
  uint64_t next = 0;                  ///< 1 + the highest chunk in use
  std::optional<uint64_t> duplicate;  ///< a chunk that two entries claim
  RangeSet leaked;                    ///< chunks below `next` that nobody claims
};
/// Needs a bit for each chunk up to the highest, or memory for the entries in use, whichever is less.
/// Holes in the leaked chunks cost memory as well: those behind the first `most_leaks` runs are not told.
TableSurvey survey(const std::vector<uint32_t>& table, size_t most_leaks);
inline constexpr size_t kMostLeaks = 65536;

/// Whether all chunks below `next` have addresses.
Result<> check_reach(const Header& header, uint64_t next);

/// Makes a block device longer: see OpenParameters::grow_device.
using DeviceGrower = std::function<Result<>(const std::string& command, uint64_t bytes, const std::string& device)>;

/// Hands out chunks: those first that a crash has left without an owner, then at the frontier. What it hands out lies
/// inside the data file. Thread-safe; one caller at a time makes the file longer, the others that need it wait.
class Chunks {
 public:
  Chunks(Storage& data, const Header& header, DeviceGrower grow_device);

  Result<> start(TableSurvey survey) EXCLUDES(mutex_);

  struct Chunk {
    uint32_t number = 0;
    bool fresh = false;  ///< reads as zeros: nobody has ever written there
  };
  /// Neighbours where there are some.
  Result<std::vector<Chunk>> reserve(uint64_t count) EXCLUDES(mutex_);
  /// They may hold anything, and are discarded, if that is possible.
  void give_back(std::span<const uint32_t> chunks) EXCLUDES(mutex_);
  /// Makes it read as zeros. Under a lease.
  Result<> clear(const Chunk& chunk);

  HostOffset host(uint32_t chunk) const { return HostOffset(data_start_ + chunk * chunk_size_); }

 private:
  /// Null: the file has to reach at least to `end`.
  std::optional<std::vector<Chunk>> take(uint64_t count, uint64_t& end) EXCLUDES(mutex_);
  uint64_t file_end() EXCLUDES(mutex_);
  /// Gives where the file ends then.
  Result<uint64_t> make_room(uint64_t end);

  Storage& data_;
  const uint64_t data_start_;
  const uint64_t chunk_size_;
  const uint64_t grow_unit_;
  const std::string command_;
  const DeviceGrower grow_device_;

  uint64_t unused_from_ = 0;  // where the file did not reach when it was opened; start() sets it

  RangeLock growth_;  // a lease on its first byte is the right to make the file longer

  Mutex mutex_;
  RangeSet free_ GUARDED_BY(mutex_);      // below next_
  uint64_t next_ GUARDED_BY(mutex_) = 0;  // the frontier
  uint64_t file_end_ GUARDED_BY(mutex_) = 0;
};

}  // namespace imgfuse::fvd
