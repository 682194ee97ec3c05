// QedView: everything that a QED image's metadata says, read without the driver's help.
#pragma once

#include <cstdint>
#include <optional>

#include "support/image_view.h"

namespace imgfuse::test {

/// A parsed image. It reads every table, skipping holes: for small images. A cluster inside the file, without the part
/// behind its last whole cluster, may have one reference; others none.
class QedView final : public ImageView {
 public:
  /// Nothing if there is no QED header.
  static std::optional<QedView> parse(const MemImage& image);

  uint64_t cluster_size() const override { return cluster_size_; }
  /// NEED_CHECK is set, or there is a backing file, with which it is not used.
  bool tables_may_change() const override { return (features_ & 3) != 0; }
  bool may_show_zeros() const override { return (features_ & 1) == 0; }  // no backing file
  bool punches_in_place() const override { return true; }
  uint64_t count(uint64_t cluster) const override { return cluster < file_clusters_; }
  bool needs_check() const { return (features_ & 2) != 0; }

 private:
  void read_l1(const MemImage& image, uint64_t offset, uint64_t table_clusters);
  void read_l2(const MemImage& image, uint64_t offset, uint64_t l1_index, uint64_t table_clusters);
  void add_table(uint64_t offset, uint64_t clusters, Owner::Kind kind, uint64_t first);

  uint64_t cluster_size_ = 0;
  uint64_t file_clusters_ = 0;
  uint64_t features_ = 0;
};

}  // namespace imgfuse::test
