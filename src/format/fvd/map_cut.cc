// What of the map is not durable: as journal sectors, or as pages of a checkpoint.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "format/fvd/journal.h"
#include "format/fvd/map.h"

namespace imgfuse::fvd {
namespace {

/// A range costs about 50 bytes.
constexpr size_t kManyRanges = 65536;
/// So much that was copied from the base is worth a checkpoint: what a crash forgets has to be copied again.
constexpr uint64_t kManySoftBytes = uint64_t{256} << 20;
/// The count of a record is 32 bits wide.
constexpr uint64_t kLongestRecord = uint64_t{1} << 30;

void merge_into(RangeSet& set, const RangeSet& other) {
  for (const auto& [first, end] : other) set.add(first, end);
}

}  // namespace

/// Neighbouring records become one where everything between them is in the image.
void Map::bridge_blocks() {
  RangeSet bridges;
  for (auto at = hard_blocks_.begin(); at != hard_blocks_.end(); ++at) {
    const auto next = std::next(at);
    if (next == hard_blocks_.end()) break;
    if (bit(at->second) && run_end(at->second, next->first) == next->first) bridges.add(at->second, next->first);
  }
  for (const auto& [first, end] : bridges) {
    promote_locked({GuestOffset(first * block_size_), (end - first) * block_size_});
    hard_blocks_.add(first, end);
  }
}

/// False if it does not fit, or cannot be said in self-contained sectors. A block's bit is in one sector with the
/// entries of all its chunks: torn apart, the block would read as zeros.
bool Map::encode_journal(std::vector<std::byte>& sectors, uint64_t room) {
  JournalWriter writer(sectors);
  const auto full = [&] { return sectors.size() / kSector >= room; };
  const auto entry = [&](uint64_t chunk) NO_THREAD_SAFETY_ANALYSIS { return table_[chunk]; };
  RangeSet left = hard_chunks_;
  bridge_blocks();
  merge_into(left, hard_chunks_);
  for (const auto& [first, end] : hard_blocks_) {
    for (uint64_t start = first; start < end;) {
      if (full()) return false;
      writer.start_sector();
      uint64_t stop = end;
      Span chunks = chunks_of({GuestOffset(start * block_size_), (end - start) * block_size_});
      chunks.end = std::min<uint64_t>(chunks.end, table_.size());
      while (const auto run = hard_chunks_.overlap(chunks.first, chunks.end)) {
        const uint64_t space = writer.room() - sizeof(wire::BitmapRecord);
        const uint64_t fits = space < sizeof(wire::TableRecord) + 4 ? 0 : (space - sizeof(wire::TableRecord)) / 4;
        const uint64_t count = std::min(run->second - run->first, fits);
        if (count > 0) {
          writer.add_table(run->first, count, entry);
          left.remove(run->first, run->first + count);
        }
        chunks.first = run->first + count;
        if (chunks.first < run->second) {
          stop = chunks.first * chunk_size_ / block_size_;
          break;
        }
      }
      const uint64_t sectors_in_record = (std::min(stop * block_size_, base_end_) - start * block_size_) / kSector;
      if (stop <= start || sectors_in_record > kLongestRecord) return false;
      writer.add_bitmap(start * block_size_ / kSector, sectors_in_record);
      start = stop;
    }
  }
  for (const auto& run : left) {
    for (uint64_t first = run.first, end = run.second; first < end;) {
      if (writer.room() < sizeof(wire::TableRecord) + 4) {
        if (full()) return false;
        writer.start_sector();
      }
      const uint64_t count = std::min(end - first, (writer.room() - sizeof(wire::TableRecord)) / 4);
      writer.add_table(first, count, entry);
      first += count;
    }
  }
  return true;
}

std::vector<PageCopy> Map::copy_table() {
  std::vector<PageCopy> copies;
  for (const auto& [first, end] : table_pages_) {
    const uint64_t begin = first * kEntriesPerPage;
    const uint64_t stop = std::min<uint64_t>(end * kEntriesPerPage, table_.size());
    if (begin >= stop) continue;
    PageCopy copy{HostOffset(header_.table_offset + begin * 4), std::vector<std::byte>((stop - begin) * 4)};
    for (uint64_t i = begin; i < stop; ++i) {
      const le<uint32_t> entry(table_[i]);
      std::memcpy(copy.bytes.data() + (i - begin) * 4, &entry, sizeof entry);
    }
    copies.push_back(std::move(copy));
  }
  table_pages_.clear();
  return copies;
}

std::vector<PageCopy> Map::copy_bitmap() {
  std::vector<PageCopy> copies;
  for (const auto& [first, end] : bitmap_pages_) {
    const ConstBytes all = std::as_bytes(std::span(bits_));
    const uint64_t begin = first * kPage;
    const uint64_t stop = std::min<uint64_t>(end * kPage, all.size());
    if (begin >= stop) continue;
    copies.push_back({HostOffset(header_.bitmap_offset + begin),
                      {all.begin() + static_cast<ptrdiff_t>(begin), all.begin() + static_cast<ptrdiff_t>(stop)}});
  }
  bitmap_pages_.clear();
  return copies;
}

MapCut Map::cut(uint64_t room, bool checkpoint, WithBase base) {
  ExclusiveLock lock(mutex_);
  MapCut cut;
  const bool complete = base == WithBase::leave && may_leave_base();
  checkpoint = checkpoint || complete;
  if (!checkpoint && !encode_journal(cut.journal, room)) {
    cut.journal.clear();
    checkpoint = true;
  }
  hard_blocks_.clear();
  hard_chunks_.clear();
  if (!checkpoint) return cut;
  soft_blocks_.clear();
  soft_chunks_.clear();
  cut.checkpoint = true;
  cut.complete = complete;
  cut.table = copy_table();
  cut.bitmap = copy_bitmap();
  return cut;
}

bool Map::has_hard() const {
  SharedLock lock(mutex_);
  return !hard_blocks_.empty() || !hard_chunks_.empty();
}

bool Map::wants_flush() const {
  SharedLock lock(mutex_);
  return hard_blocks_.ranges() + hard_chunks_.ranges() > kManyRanges;
}

bool Map::wants_checkpoint(WithBase base) const {
  SharedLock lock(mutex_);
  return soft_blocks_.ranges() + soft_chunks_.ranges() > kManyRanges ||
         soft_blocks_.numbers() * block_size_ > kManySoftBytes || (base == WithBase::leave && may_leave_base());
}

}  // namespace imgfuse::fvd
