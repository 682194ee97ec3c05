// Qcow2View: everything that a qcow2 image's metadata says, read without the driver's help.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "support/image_view.h"

namespace imgfuse::test {

/// A parsed image. It reads every table, skipping holes: for small images. Compressed clusters hold a reference on each
/// host cluster that they touch. Structures that make no sense are listed as problems and otherwise left out.
class Qcow2View final : public ImageView {
 public:
  /// Nothing if there is no qcow2 header of version 2 or 3.
  static std::optional<Qcow2View> parse(const MemImage& image);

  uint64_t cluster_size() const override { return uint64_t{1} << cluster_bits_; }
  uint64_t parts() const override { return extended_l2_ ? 32 : 1; }
  /// Refcounts cannot be relied on: the dirty or the corrupt bit is set.
  bool is_dirty() const override { return dirty_; }
  /// The dirty bit is set, and an image with lazy refcounts may have it.
  bool is_lazy() const override { return lazy_; }
  bool counts_ahead() const override { return counts_ahead_; }
  bool may_show_zeros() const override { return true; }  // what the guest copies there is not known here
  uint64_t refcount_table() const override { return refcount_table_; }
  uint64_t refcount_table_bytes() const override { return refcount_table_bytes_; }
  uint64_t counts_per_block() const override { return cluster_size() * 8 / refcount_bits_; }
  uint64_t count(uint64_t cluster) const override;
  /// A COPIED flag that lies is a corruption too.
  std::string find_corruption() const override;

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
  bool counts_ahead_ = false;
  bool extended_l2_ = false;
  bool data_file_ = false;  // guest data has no references
  uint64_t refcount_table_ = 0;
  uint64_t refcount_table_bytes_ = 0;
  std::vector<std::pair<uint64_t, uint64_t>> counts_;  // cluster, count > 0; sorted
  std::vector<std::pair<uint64_t, bool>> copied_;      // cluster, flag, of active entries
};

}  // namespace imgfuse::test
