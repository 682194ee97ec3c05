#include "support/qed_view.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/endian.h"

namespace imgfuse::test {
namespace {

template <class T>
T load_little(const MemImage& image, uint64_t offset) {
  le<T> value;
  image.read(offset, std::as_writable_bytes(std::span(&value, 1)));
  return value;
}

/// Calls `f(index, entry)` for the entries of a table that are not 0. Skips holes.
template <class F>
void for_each_word(const MemImage& image, uint64_t offset, uint64_t bytes, F f) {
  for (uint64_t done = 0; done < bytes;) {
    const StorageExtent extent = image.extent(offset + done, bytes - done);
    for (uint64_t at = done; extent.data && at < done + extent.length; at += 8)
      if (const auto entry = load_little<uint64_t>(image, offset + at); entry != 0) f(at / 8, entry);
    done += extent.length;
  }
}

}  // namespace

std::optional<QedView> QedView::parse(const MemImage& image) {
  if (image.size() < 64 || load_little<uint32_t>(image, 0) != 0x00444551) return std::nullopt;
  QedView view;
  view.cluster_size_ = load_little<uint32_t>(image, 4);
  if (view.cluster_size_ < 4096) return std::nullopt;
  view.features_ = load_little<uint64_t>(image, 16);
  view.file_clusters_ = image.size() / view.cluster_size_;
  view.references_.push_back({0, {}, 1});
  view.read_l1(image, load_little<uint64_t>(image, 40), load_little<uint32_t>(image, 8));
  std::sort(view.references_.begin(), view.references_.end());
  return view;
}

void QedView::add_table(uint64_t offset, uint64_t clusters, Owner::Kind kind, uint64_t first) {
  for (uint64_t i = 0; i < clusters; ++i) references_.push_back({offset / cluster_size_ + i, {kind, 0, first + i}, 1});
}

void QedView::read_l1(const MemImage& image, uint64_t offset, uint64_t table_clusters) {
  add_table(offset, table_clusters, Owner::Kind::l1_table, 0);
  for_each_word(image, offset, table_clusters * cluster_size_, [&](uint64_t index, uint64_t entry) {
    if (entry % cluster_size_ != 0) {
      problems_.push_back(fmt::format("L1 entry {} is {:#x}", index, entry));
      return;
    }
    add_table(entry, table_clusters, Owner::Kind::l2_table, index * table_clusters);
    read_l2(image, entry, index, table_clusters);
  });
}

void QedView::read_l2(const MemImage& image, uint64_t offset, uint64_t l1_index, uint64_t table_clusters) {
  const uint64_t entries = table_clusters * cluster_size_ / 8;
  for_each_word(image, offset, entries * 8, [&](uint64_t index, uint64_t entry) {
    const Owner owner{Owner::Kind::data, 0, l1_index * entries + index};
    if (entry == 1) return;  // zeros, nowhere
    if (entry % cluster_size_ != 0) {
      problems_.push_back(fmt::format("{}: L2 entry {:#x}", owner.text(), entry));
      return;
    }
    references_.push_back({entry / cluster_size_, owner, 1});
  });
}

}  // namespace imgfuse::test
