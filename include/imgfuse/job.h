// Jobs on whole disks, offline: copying, comparing, measuring, and moving an overlay up or down its chain.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>

#include "imgfuse/create.h"
#include "imgfuse/disk.h"
#include "imgfuse/error.h"

namespace imgfuse {

/// Told now and then, in the thread that called the job, how many bytes of the disk are dealt with.
using Progress = std::function<void(uint64_t done, uint64_t total)>;

/// How many threads a job that only moves bytes has unless told otherwise.
inline constexpr unsigned kDefaultWorkers = 4;
inline constexpr unsigned kMaxWorkers = 64;

struct ConvertOptions {
  uint64_t target_offset = 0;   ///< where the source's first byte goes; a multiple of the target's cluster size
  uint64_t sparse = 4096;       ///< zeros of at least this length take no space; 0: everything takes space
  bool target_is_zero = false;  ///< it reads as zeros: zeros need not be written
  /// The target's backing file reads as the source's does: what the source does not hold itself is left out.
  bool same_backing = false;
  unsigned workers = kDefaultWorkers;
};

/// Copies what `source` reads as into `target`, which must be long enough. On failure the target's content is
/// undefined. Neither disk is flushed or closed.
Result<> convert(Disk& source, Disk& target, const ConvertOptions& options, const Progress& progress = {});

struct CompareOptions {
  bool strict = false;  ///< sizes and allocation must be equal too
  unsigned workers = kDefaultWorkers;
};

enum class Verdict { same, content_differs, allocation_differs, size_differs, map_failed, read_failed };

struct Comparison {
  Verdict verdict = Verdict::same;
  uint64_t offset = 0;         ///< of the first byte that differs
  bool sizes_differ = false;   ///< what the longer disk has more reads as zeros, unless the verdict says otherwise
  std::optional<Error> error;  ///< of what failed
};

/// Compares what two disks read as; past its end a disk reads as zeros.
Comparison compare(Disk& a, Disk& b, const CompareOptions& options, const Progress& progress = {});

/// What a new image would take on the host, in bytes.
struct Measurement {
  uint64_t required = 0;            ///< for the content that there is
  uint64_t fully_allocated = 0;     ///< if every cluster were written
  std::optional<uint64_t> bitmaps;  ///< to copy the persistent bitmaps too; where both sides can have them
};

/// For an image made with `target` (whose size counts without a source), holding what `source` reads as.
Result<Measurement> measure(Disk* source, const CreateOptions& target);

/// Copies what the overlay and the other layers above `base` hold into `base`, which grows if it is shorter, and makes
/// it durable. `overlay` was opened with `base` as its chain's end, `layers` deep.
Result<> commit(Disk& overlay, Disk& base, uint32_t layers, const Progress& progress = {});

struct BenchOptions {
  uint64_t count = 75000;       ///< requests in all
  unsigned depth = 64;          ///< threads that each have one request under way
  uint64_t length = 4096;       ///< of a request in bytes
  uint64_t step = 0;            ///< from the begin of one request to that of the next; 0: `length`
  uint64_t offset = 0;          ///< of the first; none lies before it
  bool write = false;           ///< instead of reading
  uint8_t pattern = 0;          ///< the byte that is written
  uint64_t flush_interval = 0;  ///< flush after so many writes; 0: never
  bool drain = true;            ///< no write is under way while a flush is
};
inline constexpr uint64_t kMaxBenchCount = uint64_t{1} << 40;
inline constexpr unsigned kMaxBenchDepth = 1024;
inline constexpr uint64_t kMaxBenchMemory = uint64_t{1} << 30;  ///< of all buffers

/// Does that to the disk, and says how long it took.
Result<std::chrono::nanoseconds> bench(Disk& disk, const BenchOptions& options);

/// Copies into the overlay what would change if `new_backing` (null: none) took the place of its backing file, and
/// makes that durable. The overlay reads as before.
Result<> prepare_rebase(Disk& overlay, Disk* new_backing, const Progress& progress = {});

}  // namespace imgfuse
