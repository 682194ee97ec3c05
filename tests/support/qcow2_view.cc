#include "support/qcow2_view.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/endian.h"
#include "base/math.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kAddress = 0x00fffffffffffe00;
constexpr uint64_t kCopiedFlag = uint64_t{1} << 63;
constexpr uint64_t kCompressedFlag = uint64_t{1} << 62;

template <class T>
T load(const MemImage& image, uint64_t offset) {
  be<T> value;
  image.read(offset, std::as_writable_bytes(std::span(&value, 1)));
  return value;
}

/// Calls `f(index, entry)` for the big-endian words of a table that are not zero. Skips holes.
template <class F>
void for_each_entry(const MemImage& image, uint64_t offset, uint64_t entries, F f) {
  be<uint64_t> words[64];
  for (uint64_t done = 0; done < entries * 8;) {
    const StorageExtent extent = image.extent(offset + done, entries * 8 - done);
    for (uint64_t at = done; extent.data && at < done + extent.length; at += sizeof words) {
      image.read(offset + at, std::as_writable_bytes(std::span(words)));
      for (uint64_t i = 0; i < 64 && at / 8 + i < entries; ++i)
        if (const uint64_t word = words[i]; word != 0) f(at / 8 + i, word);
    }
    done += round_up(extent.length, sizeof words);
  }
}

/// Whether the header, which ends at `at`, is followed by an extension of that type.
bool has_extension(const MemImage& image, uint64_t at, uint32_t wanted) {
  for (uint32_t type = 0; (type = load<uint32_t>(image, at)) != 0; at += 8 + round_up(load<uint32_t>(image, at + 4), 8))
    if (type == wanted) return true;
  return false;
}

}  // namespace

std::optional<Qcow2View> Qcow2View::parse(const MemImage& image) {
  if (load<uint32_t>(image, 0) != 0x514649fb) return std::nullopt;
  Qcow2View view;
  view.version_ = load<uint32_t>(image, 4);
  view.cluster_bits_ = load<uint32_t>(image, 20);
  if (view.version_ < 2 || view.version_ > 3 || view.cluster_bits_ < 9 || view.cluster_bits_ > 21) return std::nullopt;
  const uint64_t features = view.version_ == 3 ? load<uint64_t>(image, 72) : 0;
  view.extended_l2_ = (features & 16) != 0;
  view.data_file_ = (features & 4) != 0;
  view.dirty_ = (features & 3) != 0;
  view.lazy_ = (features & 3) == 1 && (load<uint64_t>(image, 80) & 1) != 0;
  view.counts_ahead_ = has_extension(image, view.version_ == 3 ? load<uint32_t>(image, 100) : 72, 0x49464341);
  view.refcount_bits_ = 1u << (view.version_ == 3 ? load<uint32_t>(image, 96) : 4);
  view.refcount_table_ = load<uint64_t>(image, 48);
  view.refcount_table_bytes_ = uint64_t{load<uint32_t>(image, 56)} << view.cluster_bits_;

  view.references_.push_back({0, {}, view.all_parts()});
  view.read_refcounts(image);
  view.read_l1(image, load<uint64_t>(image, 40), load<uint32_t>(image, 36), 0);
  view.read_snapshots(image, load<uint64_t>(image, 64), load<uint32_t>(image, 60));
  view.read_bitmaps(image);
  std::stable_sort(view.references_.begin(), view.references_.end());  // which likes long sorted runs
  return view;
}

void Qcow2View::add_table(uint64_t offset, uint64_t bytes, Owner::Kind kind, uint16_t snapshot) {
  if (offset % cluster_size() != 0)
    problems_.push_back(fmt::format("{} at {:#x}", Owner{kind, snapshot, 0}.text(), offset));
  for (uint64_t i = 0; i < divide_up(bytes, cluster_size()); ++i)
    references_.push_back({(offset >> cluster_bits_) + i, {kind, snapshot, i}, all_parts()});
}

void Qcow2View::read_refcounts(const MemImage& image) {
  add_table(refcount_table_, refcount_table_bytes_, Owner::Kind::refcount_table, 0);
  const uint64_t per_block = cluster_size() * 8 / refcount_bits_;
  for_each_entry(image, refcount_table_, refcount_table_bytes_ / 8, [&](uint64_t index, uint64_t block) {
    if (block % cluster_size() != 0) {
      problems_.push_back(fmt::format("refcount table entry {} is {:#x}", index, block));
      return;
    }
    references_.push_back({block >> cluster_bits_, {Owner::Kind::refcount_block, 0, index}, true});
    const unsigned per_word = 64 / refcount_bits_;
    for_each_entry(image, block, cluster_size() / 8, [&](uint64_t word_index, uint64_t word) {
      for (unsigned i = 0; i < per_word; ++i) {
        // Counts of whole bytes go from the front of the word to its back; smaller ones fill each byte from its low
        // bits.
        const unsigned shift = refcount_bits_ >= 8 ? 64 - (i + 1) * refcount_bits_
                                                   : 56 - (i * refcount_bits_ / 8) * 8 + i * refcount_bits_ % 8;
        const uint64_t mask = ~uint64_t{0} >> (64 - refcount_bits_);
        if (const uint64_t count = word >> shift & mask)
          counts_.emplace_back(index * per_block + word_index * per_word + i, count);
      }
    });
  });
}

void Qcow2View::read_l1(const MemImage& image, uint64_t offset, uint64_t entries, uint16_t snapshot) {
  if (entries == 0) return;
  add_table(offset, entries * 8, Owner::Kind::l1_table, snapshot);
  for_each_entry(image, offset, entries, [&](uint64_t index, uint64_t entry) {
    const uint64_t table = entry & kAddress;
    if (table == 0) return;
    if (table % cluster_size() != 0 || (entry & ~(kAddress | kCopiedFlag)) != 0) {
      problems_.push_back(fmt::format("L1 entry {} is {:#x}", index, entry));
      return;
    }
    references_.push_back({table >> cluster_bits_, {Owner::Kind::l2_table, snapshot, index}, all_parts()});
    if (snapshot == 0) copied_.emplace_back(table >> cluster_bits_, (entry & kCopiedFlag) != 0);
    read_l2(image, table, index, snapshot);
  });
}

void Qcow2View::read_l2(const MemImage& image, uint64_t offset, uint64_t l1_index, uint16_t snapshot) {
  const uint64_t entries = cluster_size() / (extended_l2_ ? 16 : 8);
  for_each_entry(image, offset, cluster_size() / 8, [&](uint64_t index, uint64_t entry) {
    uint64_t bitmap = 0;
    if (extended_l2_) {
      if (index % 2 != 0) return;
      bitmap = load<uint64_t>(image, offset + index * 8 + 8);
      index /= 2;
    }
    const Owner owner{Owner::Kind::data, snapshot, l1_index * entries + index};
    if (entry & kCompressedFlag) {
      const unsigned address_bits = 70 - cluster_bits_;
      const uint64_t begin = entry & ((uint64_t{1} << address_bits) - 1) & ((uint64_t{1} << 56) - 1);
      const uint64_t sectors = ((entry & ~(kCompressedFlag | kCopiedFlag)) >> address_bits) + 1;
      const uint64_t last = begin / 512 * 512 + sectors * 512 - 1;
      for (uint64_t c = begin >> cluster_bits_; c <= last >> cluster_bits_; ++c)
        references_.push_back({c, owner, all_parts(), begin, std::max(begin, last / 512 * 512)});
      if (entry & kCopiedFlag) problems_.push_back(owner.text() + " is compressed and copied");
      return;
    }
    const uint64_t host = entry & kAddress;
    const bool present = host != 0 || (data_file_ && (entry & kCopiedFlag) != 0);
    const uint64_t filled = bitmap & 0xffffffff;
    if ((filled & bitmap >> 32) != 0 || (!present && filled != 0))
      problems_.push_back(fmt::format("{}: subcluster bitmap {:#x}", owner.text(), bitmap));
    const bool zero = extended_l2_ ? filled == 0 : (entry & 1) != 0;
    if (host % cluster_size() != 0 || (entry & ~(kAddress | kCopiedFlag | (extended_l2_ ? 0 : 1))) != 0 ||
        (zero && version_ == 2)) {
      problems_.push_back(fmt::format("{}: L2 entry {:#x}", owner.text(), entry));
      return;
    }
    if (data_file_ && present && (host != owner.index << cluster_bits_ || (entry & kCopiedFlag) == 0))
      problems_.push_back(fmt::format("{}: L2 entry {:#x} in an image with a data file", owner.text(), entry));
    if (host == 0 || data_file_) return;
    references_.push_back({host >> cluster_bits_, owner, extended_l2_ ? filled : !zero});
    if (snapshot == 0) copied_.emplace_back(host >> cluster_bits_, (entry & kCopiedFlag) != 0);
  });
}

void Qcow2View::read_snapshots(const MemImage& image, uint64_t offset, uint32_t number) {
  uint64_t at = offset;
  for (uint32_t i = 0; i < number; ++i) {
    read_l1(image, load<uint64_t>(image, at), load<uint32_t>(image, at + 8), static_cast<uint16_t>(i + 1));
    const uint64_t length =
        uint64_t{40} + load<uint32_t>(image, at + 36) + load<uint16_t>(image, at + 12) + load<uint16_t>(image, at + 14);
    at += round_up(length, 8);
  }
  if (number > 0) add_table(offset, at - offset, Owner::Kind::snapshot_table, 0);
}

/// A bitmap's clusters have no path that outlives a store, so each is its own owner's.
void Qcow2View::read_bitmaps(const MemImage& image) {
  if (version_ < 3 || (load<uint64_t>(image, 88) & 1) == 0) return;
  uint64_t at = load<uint32_t>(image, 100);
  while (at + 32 <= cluster_size() && load<uint32_t>(image, at) != 0x23852875) {
    if (load<uint32_t>(image, at) == 0) return;
    at += 8 + round_up(load<uint32_t>(image, at + 4), 8);
  }
  const auto number = load<uint32_t>(image, at + 8);
  const auto length = load<uint64_t>(image, at + 16);
  const auto offset = load<uint64_t>(image, at + 24);
  if (at + 32 > cluster_size() || length > 1 << 20) return;
  const auto add = [&](uint64_t host, uint64_t bytes, Owner::Kind kind) {
    if (host % cluster_size() != 0) problems_.push_back(fmt::format("{} at {:#x}", Owner{kind, 0, 0}.text(), host));
    for (uint64_t i = 0; i < divide_up(bytes, cluster_size()); ++i) {
      const uint64_t cluster = (host >> cluster_bits_) + i;
      references_.push_back({cluster, {kind, 0, cluster}, true});
    }
  };
  add(offset, length, Owner::Kind::bitmap_directory);
  uint64_t entry = offset;
  for (uint32_t i = 0; i < number && entry + 24 <= offset + length; ++i) {
    const auto table = load<uint64_t>(image, entry);
    const auto entries = load<uint32_t>(image, entry + 8);
    add(table, uint64_t{entries} * 8, Owner::Kind::bitmap_table);
    for_each_entry(image, table, entries, [&](uint64_t, uint64_t word) {
      if (word & kAddress) add(word & kAddress, cluster_size(), Owner::Kind::bitmap_bits);
    });
    entry += round_up(uint64_t{24} + load<uint32_t>(image, entry + 20) + load<uint16_t>(image, entry + 18), 8);
  }
}

uint64_t Qcow2View::count(uint64_t cluster) const {
  if (cluster < counts_.size() && counts_[cluster].first == cluster)
    return counts_[cluster].second;  // no gap before it
  const auto at = std::lower_bound(counts_.begin(), counts_.end(), std::pair<uint64_t, uint64_t>(cluster, 0));
  return at != counts_.end() && at->first == cluster ? at->second : 0;
}

std::string Qcow2View::find_corruption() const {
  if (std::string wrong = ImageView::find_corruption(); !wrong.empty()) return wrong;
  for (const auto& [cluster, flag] : copied_)
    if (flag != (count(cluster) == 1))
      return fmt::format("cluster {} has a count of {} and a COPIED flag of {}", cluster, count(cluster), flag);
  return {};
}

}  // namespace imgfuse::test
