// FvdView: an FVD image as an independent reader sees it. Written from the format alone; shares no code with the
// driver.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "support/image_view.h"

namespace imgfuse::test {

/// A whole image in memory, with the journal applied if it was not shut down cleanly. Nothing is counted in it, and the
/// order in which it is written is looked at by crashing it only.
class FvdView final : public ImageView {
 public:
  /// Nothing if it is no FVD version 1 image.
  static std::optional<FvdView> parse(const MemImage& image);

  uint64_t virtual_size = 0, base_size = 0, metadata_size = 0, chunk_size = 0, block_size = 0;
  bool compact = false, all_data = true, clean = true;
  std::vector<uint32_t> table;
  std::vector<bool> in_image;  ///< by block
  uint64_t table_records = 0, bitmap_records = 0, used_journal_sectors = 0;

  /// These parts of the disk, the rest as zeros; `base` is what the base image reads as, `data` another file for the
  /// data if there is one.
  MemImage content(const std::vector<GuestRange>& parts, const MemImage& base, const MemImage* data = nullptr) const;
  /// What is wrong with the image; empty: nothing. Journal records are looked at whether the image is clean or not.
  std::string find_corruption() const override;

  uint64_t cluster_size() const override { return compact ? chunk_size : 4096; }
  bool is_dirty() const override { return !clean; }
  bool can_be_watched() const override { return false; }
  uint64_t count(uint64_t) const override { return 1; }

 private:
  explicit FvdView(MemImage image) : image_(std::move(image)) {}
  uint64_t number(uint64_t offset, int bytes) const;
  void replay(uint64_t offset, uint64_t sectors);

  MemImage image_;
  bool separate_data_ = false;
  std::string journal_error_;
};

}  // namespace imgfuse::test
