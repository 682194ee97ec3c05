// Where guest bytes are: the chunk table and the block bitmap, in memory as a whole, and what of them is not durable.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/mutex.h"
#include "core/range_set.h"
#include "format/fvd/header.h"
#include "imgfuse/units.h"

namespace imgfuse::fvd {

/// How a stretch of the disk is stored.
enum class RunKind {
  image,  ///< at `host` in the data file
  base,   ///< in the base image
  zero,   ///< in the image, without storage
};

struct Run {
  RunKind kind = RunKind::image;
  uint64_t length = 0;
  HostOffset host;         ///< (image)
  bool over_base = false;  ///< (zero) the base may hold something here
};

/// What a write has to have alone.
enum class Need {
  nothing,  ///< everything it touches is in the image
  blocks,   ///< some blocks are still in the base
  chunks,   ///< and some chunks have no storage
};

/// Whether a change is to be durable at the next flush, or whenever it suits: copies from the base can be forgotten.
enum class Durability { hard, soft };

/// A chunk gets storage.
struct NewChunk {
  uint64_t index = 0;     ///< in the table
  uint32_t physical = 0;  ///< in the data file
};

/// Bytes of a metadata region as they were at a cut.
struct PageCopy {
  HostOffset where;
  std::vector<std::byte> bytes;
};

/// One flush cycle's metadata.
struct MapCut {
  std::vector<std::byte> journal;  ///< sectors to append; empty at a checkpoint
  bool checkpoint = false;
  std::vector<PageCopy> table, bitmap;  ///< (checkpoint) what has changed since the last one
  bool complete = false;                ///< (checkpoint) nothing is left in the base

  bool has_changes() const { return !journal.empty() || !table.empty() || !bitmap.empty() || complete; }
};

/// Entries in one page of the table.
inline constexpr uint64_t kEntriesPerPage = kPage / sizeof(uint32_t);

/// Table and bitmap. A change is made here after its data was written. Each part of the map that is not durable is
/// either hard (in the journal after the next flush) or soft (durable with the next checkpoint).
///
/// Threads: any; the mutex (rank 5) is taken inside and held for lookups and edits only.
class Map {
 public:
  explicit Map(const Header& header);

  /// Loading: from the storage, then from the journal. Before anybody else can call.
  Result<> load(Storage& storage) NO_THREAD_SAFETY_ANALYSIS;
  Result<> replay(Storage& storage) NO_THREAD_SAFETY_ANALYSIS;
  /// The table while nobody changes it.
  const std::vector<uint32_t>& table() const NO_THREAD_SAFETY_ANALYSIS { return table_; }

  Run lookup(GuestRange range) const EXCLUDES(mutex_);
  /// As lookup(), as if all of it were in the image: where it would lie.
  Run place(GuestRange range) const EXCLUDES(mutex_);
  /// The chunk of an entry that is not empty.
  uint32_t chunk(uint64_t index) const EXCLUDES(mutex_);
  Need need(GuestRange range) const EXCLUDES(mutex_);
  /// What has to be stored so that the range can be: widened to the borders of blocks that are in the base.
  GuestRange filled(GuestRange range) const EXCLUDES(mutex_);
  /// The chunks in the range without storage.
  std::vector<uint64_t> missing_chunks(GuestRange range) const EXCLUDES(mutex_);

  /// The range is in the image from now on, with storage for these chunks. For zeros over a base there may be none.
  void publish(GuestRange stored, std::span<const NewChunk> chunks, Durability durability) EXCLUDES(mutex_);
  /// The guest writes here: what was soft is hard. Whether there was anything.
  bool promote(GuestRange range) EXCLUDES(mutex_);
  /// The range goes back to the base; nothing of it is in the journal. Chunks keep their storage.
  void clear_blocks(GuestRange range) EXCLUDES(mutex_);
  /// These chunks lose their storage, durably only after a checkpoint. Returns it.
  std::vector<uint32_t> unmap_chunks(uint64_t first, uint64_t end) EXCLUDES(mutex_);
  /// The disk has another size. Entries behind the old end are empty.
  void resize(const Header& header) EXCLUDES(mutex_);

  enum class WithBase { keep, leave };
  /// Takes what has to be made durable: as journal sectors if they fit into `room` sectors, else as a checkpoint.
  /// `base`: whether an image that has everything may say so.
  MapCut cut(uint64_t room, bool checkpoint, WithBase base) EXCLUDES(mutex_);
  /// Whether the header says that nothing is left in the base. Until the image is closed the base stays in use, since
  /// forget() may go back to it.
  bool base_is_left() const EXCLUDES(mutex_);
  void set_base_left(bool left) EXCLUDES(mutex_);

  /// Something belongs into the journal.
  bool has_hard() const EXCLUDES(mutex_);
  /// So much is not durable that it should become so.
  bool wants_flush() const EXCLUDES(mutex_);
  bool wants_checkpoint(WithBase base) const EXCLUDES(mutex_);
  /// Something has changed since the last checkpoint.
  bool changed() const EXCLUDES(mutex_);
  uint64_t base_end() const EXCLUDES(mutex_);
  uint64_t allocated() const EXCLUDES(mutex_);

 private:
  struct Span {
    uint64_t first, end;
  };
  bool bit(uint64_t block) const REQUIRES_SHARED(mutex_) { return (bits_[block / 8] >> (block % 8) & 1) != 0; }
  /// The first block from `block` on whose bit differs from its own.
  uint64_t run_end(uint64_t block, uint64_t end) const REQUIRES_SHARED(mutex_);
  Run place_locked(GuestRange range) const REQUIRES_SHARED(mutex_);
  void set_bits(Span blocks) REQUIRES(mutex_);
  Span blocks_of(GuestRange range) const REQUIRES_SHARED(mutex_);
  Span chunks_of(GuestRange range) const REQUIRES_SHARED(mutex_);
  GuestRange filled_locked(GuestRange range) const REQUIRES_SHARED(mutex_);
  bool may_leave_base() const REQUIRES_SHARED(mutex_) { return base_end_ > 0 && missing_ == 0 && !base_left_; }
  bool has_missing_blocks(GuestRange range) const REQUIRES_SHARED(mutex_);
  void promote_locked(GuestRange range) REQUIRES(mutex_);
  bool encode_journal(std::vector<std::byte>& sectors, uint64_t room) REQUIRES(mutex_);
  void bridge_blocks() REQUIRES(mutex_);
  std::vector<PageCopy> copy_table() REQUIRES(mutex_);
  std::vector<PageCopy> copy_bitmap() REQUIRES(mutex_);

  const uint64_t block_size_;
  const uint64_t chunk_size_;  // 0: not compact
  const uint64_t data_start_;

  mutable SharedMutex mutex_{LockRank::metadata};
  Header header_ GUARDED_BY(mutex_);
  uint64_t base_end_ GUARDED_BY(mutex_);
  std::vector<uint32_t> table_ GUARDED_BY(mutex_);
  std::vector<uint8_t> bits_ GUARDED_BY(mutex_);
  uint64_t missing_ GUARDED_BY(mutex_) = 0;  // blocks that are in the base
  uint64_t mapped_ GUARDED_BY(mutex_) = 0;   // chunks with storage
  bool base_left_ GUARDED_BY(mutex_) = false;
  RangeSet hard_blocks_ GUARDED_BY(mutex_), soft_blocks_ GUARDED_BY(mutex_);
  RangeSet hard_chunks_ GUARDED_BY(mutex_), soft_chunks_ GUARDED_BY(mutex_);
  RangeSet table_pages_ GUARDED_BY(mutex_), bitmap_pages_ GUARDED_BY(mutex_);  // changed since the last checkpoint
};

}  // namespace imgfuse::fvd
