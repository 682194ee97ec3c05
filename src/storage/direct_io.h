// O_DIRECT for requests of any alignment.
#pragma once

#include "base/mutex.h"
#include "storage/host_file.h"

namespace imgfuse {

/// What the host demands of O_DIRECT requests, in bytes.
struct DirectAlignment {
  uint32_t memory = 4096;
  uint32_t block = 4096;  ///< of offsets and lengths
};

/// Aligned requests go straight to the file. Others pass through an aligned bounce buffer (one per thread, at most
/// kWindow); blocks that a write covers in part are read first and written whole, with all other writes kept out.
///
/// The block in which the file ends is the exception: writing it whole would lengthen the file. It is written through
/// the page cache, with O_DIRECT off for that moment. The kernel keeps the two coherent as long as no other write runs
/// beside it; reads may. (Writing whole blocks and truncating would leave a wrong length after a crash.)
class DirectIo {
 public:
  static constexpr size_t kWindow = size_t{256} << 10;

  /// Fails if the file system has no O_DIRECT. On success `file` is in direct mode, and only this may transfer.
  static Result<DirectAlignment> enable(HostFile& file);

  /// `blocks` is held shared by aligned writes, exclusively while blocks are read, changed and written. Whoever changes
  /// the file by other means (fallocate, truncate) holds it too.
  DirectIo(HostFile& file, DirectAlignment alignment, SharedMutex& blocks)
      : file_(file), alignment_(alignment), blocks_(blocks) {}

  Result<> read(uint64_t offset, Bytes out);
  Result<> write(uint64_t offset, std::span<const ConstBytes> parts) EXCLUDES(blocks_);

 private:
  bool aligned(uint64_t offset) const { return offset % alignment_.block == 0; }
  bool aligned(ConstBytes bytes) const;
  Result<> write_windows(uint64_t offset, uint64_t end, std::span<const ConstBytes> parts);
  Result<> write_window(uint64_t at, Bytes window, uint64_t offset, uint64_t end);

  HostFile& file_;
  const DirectAlignment alignment_;
  SharedMutex& blocks_;
};

}  // namespace imgfuse
