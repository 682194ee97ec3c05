// Qcow2View: everything that a qcow2 image's metadata says, read without the driver's help.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "support/mem_storage.h"

namespace imgfuse::test {

/// Who points at a host cluster. Guest data and L2 tables are named by the path to them, so that a table that was
/// copied does not change who owns what it points at.
struct Owner {
  enum class Kind : uint8_t {
    header,
    refcount_table,
    refcount_block,
    l1_table,
    snapshot_table,
    l2_table,
    bitmap_directory,
    bitmap_table,
    bitmap_bits,
    data
  };
  Kind kind = Kind::header;
  uint16_t snapshot = 0;  ///< 0: the active disk, otherwise the snapshot's number
  uint64_t index = 0;     ///< L1 index, guest cluster, block number, cluster of the table, host cluster (bitmaps)

  auto operator<=>(const Owner&) const = default;
  bool is_metadata() const { return kind != Kind::data; }
  std::string text() const;
};

struct Reference {
  uint64_t cluster = 0;  ///< on the host
  Owner owner;
  uint64_t shown = 0;  ///< a bit for each part of the cluster whose bytes can be seen: none in a zero cluster
  /// A compressed stream: its first byte and the first of its last sector in the file. It fills what lies between; how
  /// much of the last sector is its own is not known. Otherwise 0.
  uint64_t stream_begin = 0, stream_last = 0;

  bool is_stream() const { return stream_begin != 0; }
  auto operator<=>(const Reference&) const = default;
};

/// A parsed image. It reads every table, skipping holes: for small images. Compressed clusters hold a reference on each
/// host cluster that they touch. Structures that make no sense are listed as problems and otherwise left out.
class Qcow2View {
 public:
  /// Nothing if there is no qcow2 header of version 2 or 3.
  static std::optional<Qcow2View> parse(const MemImage& image);

  uint64_t cluster_size() const { return uint64_t{1} << cluster_bits_; }
  /// What can be seen apart: subclusters, or the cluster as a whole.
  uint64_t parts() const { return extended_l2_ ? 32 : 1; }
  uint64_t part_size() const { return cluster_size() / parts(); }
  uint64_t all_parts() const { return (uint64_t{1} << parts()) - 1; }
  /// Refcounts cannot be relied on: the dirty or the corrupt bit is set.
  bool is_dirty() const { return dirty_; }
  /// It is only that counts are postponed: the dirty bit is set, and an image with lazy refcounts may have it.
  bool is_lazy() const { return lazy_; }
  uint64_t refcount_table() const { return refcount_table_; }
  uint64_t refcount_table_bytes() const { return refcount_table_bytes_; }
  uint64_t counts_per_block() const { return cluster_size() * 8 / refcount_bits_; }
  /// Sorted.
  const std::vector<Reference>& references() const { return references_; }
  uint64_t count(uint64_t cluster) const;
  const std::vector<std::string>& problems() const { return problems_; }
  /// The first thing that is wrong: a problem, a count below the references, a COPIED flag that lies. Leaks are not.
  std::string find_corruption() const;

 private:
  void read_refcounts(const MemImage& image);
  void read_l1(const MemImage& image, uint64_t offset, uint64_t entries, uint16_t snapshot);
  void read_l2(const MemImage& image, uint64_t offset, uint64_t l1_index, uint16_t snapshot);
  void read_snapshots(const MemImage& image, uint64_t offset, uint32_t number);
  void read_bitmaps(const MemImage& image);
  void add_table(uint64_t offset, uint64_t bytes, Owner::Kind kind, uint16_t snapshot);

  unsigned cluster_bits_ = 0;
  unsigned version_ = 0;
  unsigned refcount_bits_ = 0;
  bool dirty_ = false;
  bool lazy_ = false;
  bool extended_l2_ = false;
  bool data_file_ = false;  // guest data has no references
  uint64_t refcount_table_ = 0;
  uint64_t refcount_table_bytes_ = 0;
  std::vector<Reference> references_;
  std::vector<std::pair<uint64_t, uint64_t>> counts_;  // cluster, count > 0; sorted
  std::vector<std::pair<uint64_t, bool>> copied_;      // cluster, flag, of active entries
  std::vector<std::string> problems_;
};

}  // namespace imgfuse::test
