// ImageView: everything that an image's metadata says, read without the driver's help.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
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

/// A parsed image, of any format that has clusters and pointers to them.
class ImageView {
 public:
  /// Null if there is no header of a known format.
  static std::shared_ptr<const ImageView> parse(const MemImage& image);
  virtual ~ImageView() = default;

  virtual uint64_t cluster_size() const = 0;
  /// What can be seen apart: subclusters, or the cluster as a whole.
  virtual uint64_t parts() const { return 1; }
  uint64_t part_size() const { return cluster_size() / parts(); }
  uint64_t all_parts() const { return (uint64_t{1} << parts()) - 1; }
  /// Counts cannot be relied on.
  virtual bool is_dirty() const { return false; }
  /// It is only that counts are postponed, and the header says so.
  virtual bool is_lazy() const { return false; }
  /// By OrderStorage.
  virtual bool can_be_watched() const { return !is_dirty() || is_lazy(); }
  /// Tables may be changed as far as the header is concerned; it has to say so durably.
  virtual bool tables_may_change() const { return true; }
  /// A cluster that no entry shows reads as zeros, so one that holds zeros may be shown at any time.
  virtual bool may_show_zeros() const { return false; }
  /// Clusters that nothing points at may be counted, and the header says so.
  virtual bool counts_ahead() const { return false; }
  /// A hole may be punched into a cluster that stays in use: it is written with zeros.
  virtual bool punches_in_place() const { return false; }
  /// Where the format has such a table; otherwise 0.
  virtual uint64_t refcount_table() const { return 0; }
  virtual uint64_t refcount_table_bytes() const { return 0; }
  virtual uint64_t counts_per_block() const { return 1; }
  /// How many references a cluster may have.
  virtual uint64_t count(uint64_t cluster) const = 0;
  /// The first thing that is wrong: a problem, or more references than there may be. Leaks are not.
  virtual std::string find_corruption() const;

  /// Sorted.
  const std::vector<Reference>& references() const { return references_; }
  const std::vector<std::string>& problems() const { return problems_; }

 protected:
  std::vector<Reference> references_;
  std::vector<std::string> problems_;
};

}  // namespace imgfuse::test
