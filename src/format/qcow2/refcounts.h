// Reference counts of host clusters: the refcount table and its blocks.
#pragma once

#include <span>
#include <vector>

#include "base/endian.h"
#include "core/flusher.h"
#include "format/qcow2/image.h"

namespace imgfuse::qcow2 {

/// Reads the count at `index` of a (piece of a) refcount block, and writes it. Widths below a byte fill each byte from
/// its low bits; wider ones are big-endian (specification, section 9).
uint64_t get_refcount(ConstBytes block, uint64_t index, uint32_t bits);
void set_refcount(Bytes block, uint64_t index, uint32_t bits, uint64_t value);

/// Finds, changes and, where they are missing, makes refcount blocks. Any thread; the functions that block say so.
class Refcounts {
 public:
  explicit Refcounts(Image& image) : image_(image) {}

  /// Reads the refcount table. Call once, before anything else.
  Result<> load(const Header& header);

  /// A pinned run of counts that lie in one cached slice.
  struct Slice {
    TableCache::Pin pin;  ///< empty where there is no block: all counts are zero
    uint64_t first = 0;   ///< host cluster of the first count
    uint64_t count = 0;
  };
  /// The slice with the count of `cluster`. May block to load it.
  Result<Slice> slice_of(uint64_t cluster, TableCache::Room room = TableCache::Room::flush_for_it);

  uint64_t get(const Slice& slice, uint64_t cluster) const;  ///< under Image::mutex, shared
  /// The first cluster from `cluster` on with a count of zero, or the slice's end. Under Image::mutex, shared.
  uint64_t first_free(const Slice& slice, uint64_t cluster) const;
  /// Whatever comes to rely on a raised count is written behind it. Under Image::mutex, exclusive; pinned.
  void set(const Slice& slice, uint64_t cluster, uint64_t value);
  /// Counts a cluster that nobody relies on before this is durable. As set() otherwise.
  void count_ahead(const Slice& slice, uint64_t cluster) { put(slice, cluster, 1); }

  /// Makes the block (and, where the table is too short, a longer table) that counts `cluster`. Blocks: writes, and one
  /// to three host flushes, but seldom. One caller at a time. Returns the end of the clusters that it wrote to.
  Result<uint64_t> create_block(uint64_t cluster);

  /// Most contiguous clusters that there can be between the blocks that create_block() makes.
  uint64_t longest_run() const;
  /// Makes the blocks for `clusters` contiguous free clusters at the first region from `cluster` on behind which there
  /// are no blocks. Returns the first of them. `no_space` if they do not end before `limit`. As create_block()
  /// otherwise.
  Result<uint64_t> make_room(uint64_t cluster, uint64_t clusters, uint64_t limit);

  /// Takes blocks that count nothing but themselves off the end of the table, durably. Returns those that other blocks
  /// count, which are to be freed: then more may be empty. Nobody makes a block meanwhile. Blocks.
  Result<std::vector<uint64_t>> drop_empty_end();
  /// The end of the last cluster that is counted. Blocks.
  Result<uint64_t> end_of_counted();

  /// The places of all blocks, as the table has them: 0 where there is none.
  std::vector<uint64_t> table() const;
  /// The table at `offset`, with these entries, is the image's from here on. Returns where the old one lies, which is
  /// to be freed, as are the blocks that are no longer named. Under Image::mutex, exclusive; nobody makes a block
  /// meanwhile.
  HostRange adopt_table(HostOffset offset, std::vector<uint64_t> entries);

  /// Tables that were replaced by longer ones since the last call: unreachable, and to be freed.
  std::vector<HostRange> take_replaced_tables();

 private:
  void put(const Slice& slice, uint64_t cluster, uint64_t value);
  uint64_t blocks_at_once() const;
  Result<uint64_t> create_blocks_in_table(uint64_t index, uint64_t count);
  Result<> write_entries(uint64_t index, std::span<const be<uint64_t>> entries);
  Result<uint64_t> grow_table(uint64_t index, uint64_t free_clusters);
  Result<> write_blocks(uint64_t index, uint64_t count, uint64_t used_clusters);
  Result<uint64_t> end_of_counted(uint64_t index);
  HostOffset block_at(uint64_t index) const REQUIRES_SHARED(image_.mutex);

  Image& image_;
  HostOffset table_offset_;  // changed by create_block() only, as its caller is alone
  uint64_t table_clusters_ = 0;
  std::vector<uint64_t> table_ GUARDED_BY(image_.mutex);
  std::vector<HostRange> replaced_ GUARDED_BY(image_.mutex);
};

}  // namespace imgfuse::qcow2
