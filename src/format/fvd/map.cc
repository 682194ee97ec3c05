#include "format/fvd/map.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/buffer.h"
#include "format/fvd/journal.h"

namespace imgfuse::fvd {
namespace {

constexpr uint64_t kPiece = 1 << 20;

}  // namespace

Map::Map(const Header& header)
    : block_size_(header.block_size),
      chunk_size_(header.compact ? header.chunk_size : 0),
      data_start_(header.data_start()),
      header_(header),
      base_end_(header.base_end()) {}

// ---- Loading

Result<> Map::load(Storage& storage) {
  bits_.resize(header_.bitmap_bytes());
  IMG_TRY(storage.read(HostOffset(header_.bitmap_offset), std::as_writable_bytes(std::span(bits_))));
  for (uint64_t block = 0; block < header_.blocks();) {
    const uint64_t end = run_end(block, header_.blocks());
    if (!bit(block)) missing_ += end - block;
    block = end;
  }
  table_.resize(header_.chunks());
  IMG_TRY(storage.read(HostOffset(header_.table_offset), std::as_writable_bytes(std::span(table_))));
  for (uint32_t& entry : table_) {  // there may be millions
    const auto stored = std::bit_cast<le<uint32_t>>(entry);
    entry = stored == kEmpty ? kEmpty : stored & ~kDirtyBit;
    mapped_ += entry != kEmpty;
  }
  return {};
}

/// Every record there is: later ones repeat or add to earlier ones.
Result<> Map::replay(Storage& storage) {
  const JournalReader reader{
      [&](uint64_t first, ConstBytes entries) NO_THREAD_SAFETY_ANALYSIS -> Result<> {
        const uint64_t count = entries.size() / 4;
        if (first > table_.size() || count > table_.size() - first)
          return fail(ErrorCode::corrupt, "table entries {} to {} are recorded, and the disk has {} chunks", first,
                      first + count, table_.size());
        for (uint64_t i = 0; i < count; ++i) {
          le<uint32_t> entry;
          std::memcpy(&entry, entries.data() + i * 4, sizeof entry);
          uint32_t& old = table_[first + i];
          if (entry == kEmpty || old == (entry & ~kDirtyBit)) continue;
          if (old == kEmpty) ++mapped_;
          old = entry & ~kDirtyBit;
          table_pages_.add((first + i) / kEntriesPerPage, (first + i) / kEntriesPerPage + 1);
        }
        return {};
      },
      [&](uint64_t first, uint64_t sectors) NO_THREAD_SAFETY_ANALYSIS -> Result<> {
        const uint64_t disk = header_.virtual_size / kSector;
        if (first > disk || sectors > disk - first)
          return fail(ErrorCode::corrupt, "sectors {:#x}+{:#x} are recorded, and the disk has {:#x}", first, sectors,
                      disk);
        set_bits(blocks_of({GuestOffset(first * kSector), sectors * kSector}));
        return {};
      }};
  const uint64_t sectors = header_.journal_sectors();
  Buffer piece(std::min(kPiece, sectors * kSector));
  for (uint64_t at = 0; at < sectors;) {
    const HostRange rest{HostOffset(header_.journal_offset + at * kSector), (sectors - at) * kSector};
    IMG_LET(const StorageExtent extent, storage.extent(rest));
    if (!extent.data && extent.length >= kSector) {  // no records: a file may say that it has a huge journal
      at += extent.length / kSector;
      continue;
    }
    const uint64_t count = std::min(sectors - at, kPiece / kSector);
    IMG_TRY(storage.read(rest.begin, piece.bytes().first(count * kSector)));
    for (uint64_t i = 0; i < count; ++i)
      IMG_TRY(reader.read_sector(piece.bytes().subspan(i * kSector, kSector), at + i));
    at += count;
  }
  return {};
}

// ---- Bits and ranges

uint64_t Map::run_end(uint64_t block, uint64_t end) const {
  const bool wanted = bit(block);
  const uint8_t whole = wanted ? 0xff : 0;
  while (block < end) {
    if (block % 8 == 0 && end - block >= 8 && bits_[block / 8] == whole) {
      block += 8;
    } else if (bit(block) == wanted) {
      ++block;
    } else {
      break;
    }
  }
  return block;
}

void Map::set_bits(Span blocks) {
  for (uint64_t block = blocks.first; block < blocks.end;) {
    const uint64_t end = run_end(block, blocks.end);
    if (!bit(block)) {
      missing_ -= end - block;
      for (uint64_t i = block; i < end; ++i) bits_[i / 8] = static_cast<uint8_t>(bits_[i / 8] | 1u << (i % 8));
      bitmap_pages_.add(block / 8 / kPage, (end - 1) / 8 / kPage + 1);
    }
    block = end;
  }
}

/// The blocks that the range touches, as far as the base goes.
Map::Span Map::blocks_of(GuestRange range) const {
  const uint64_t end = std::min(range.end().bytes(), base_end_);
  if (range.begin.bytes() >= end) return {0, 0};
  return {range.begin.bytes() / block_size_, divide_up(end, block_size_)};
}

Map::Span Map::chunks_of(GuestRange range) const {
  if (chunk_size_ == 0 || range.empty()) return {0, 0};
  return {range.begin.bytes() / chunk_size_, divide_up(range.end().bytes(), chunk_size_)};
}

bool Map::has_missing_blocks(GuestRange range) const {
  const auto [first, end] = blocks_of(range);
  return first < end && (!bit(first) || run_end(first, end) < end);
}

// ---- Looking

Run Map::lookup(GuestRange range) const {
  SharedLock lock(mutex_);
  const uint64_t begin = range.begin.bytes();
  if (begin >= base_end_) return place_locked(range);
  const uint64_t block = begin / block_size_;
  const uint64_t limit = std::min(range.end().bytes(), base_end_);
  const uint64_t stop = std::min(run_end(block, divide_up(limit, block_size_)) * block_size_, limit);
  if (!bit(block)) return {RunKind::base, stop - begin, {}, true};
  // What lies behind the base's end is in the image too.
  Run run = place_locked(stop < base_end_ ? GuestRange{range.begin, stop - begin} : range);
  if (run.kind == RunKind::zero) {
    run.over_base = true;
    run.length = std::min(run.length, base_end_ - begin);
  }
  return run;
}

Run Map::place(GuestRange range) const {
  SharedLock lock(mutex_);
  return place_locked(range);
}

Run Map::place_locked(GuestRange range) const {
  const uint64_t begin = range.begin.bytes();
  if (chunk_size_ == 0) return {RunKind::image, range.length, HostOffset(data_start_ + begin), false};
  const uint64_t chunk = begin / chunk_size_;
  const uint32_t first = table_[chunk];
  uint64_t stop = (chunk + 1) * chunk_size_;
  for (uint64_t next = 1; stop < range.end().bytes(); ++next, stop += chunk_size_)
    if (table_[chunk + next] != (first == kEmpty ? kEmpty : first + next)) break;
  const uint64_t length = std::min(range.end().bytes(), stop) - begin;
  if (first == kEmpty) return {RunKind::zero, length, {}, false};
  return {RunKind::image, length, HostOffset(data_start_ + first * chunk_size_ + begin % chunk_size_), false};
}

uint32_t Map::chunk(uint64_t index) const {
  SharedLock lock(mutex_);
  return table_[index];
}

GuestRange Map::filled(GuestRange range) const {
  SharedLock lock(mutex_);
  return filled_locked(range);
}

GuestRange Map::filled_locked(GuestRange range) const {
  const auto [first, last] = blocks_of(range);
  if (first == last) return range;
  uint64_t begin = range.begin.bytes();
  uint64_t end = range.end().bytes();
  if (!bit(first)) begin = first * block_size_;
  if (end < base_end_ && !bit(last - 1)) end = std::min(last * block_size_, base_end_);
  return {GuestOffset(begin), end - begin};
}

std::vector<uint64_t> Map::missing_chunks(GuestRange range) const {
  SharedLock lock(mutex_);
  const auto [first, end] = chunks_of(range);
  std::vector<uint64_t> missing;
  for (uint64_t chunk = first; chunk < end; ++chunk)
    if (table_[chunk] == kEmpty) missing.push_back(chunk);
  return missing;
}

Need Map::need(GuestRange range) const {
  SharedLock lock(mutex_);
  const auto [first, end] = chunks_of(filled_locked(range));
  for (uint64_t chunk = first; chunk < end; ++chunk)
    if (table_[chunk] == kEmpty) return Need::chunks;
  return has_missing_blocks(range) ? Need::blocks : Need::nothing;
}

// ---- Changing

void Map::publish(GuestRange stored, std::span<const NewChunk> chunks, Durability durability) {
  ExclusiveLock lock(mutex_);
  RangeSet& to = durability == Durability::hard ? hard_chunks_ : soft_chunks_;
  for (const NewChunk& chunk : chunks) {
    table_[chunk.index] = chunk.physical;
    ++mapped_;
    to.add(chunk.index, chunk.index + 1);
    table_pages_.add(chunk.index / kEntriesPerPage, chunk.index / kEntriesPerPage + 1);
  }
  const Span blocks = blocks_of(stored);
  for (uint64_t block = blocks.first; block < blocks.end;) {
    const uint64_t end = run_end(block, blocks.end);
    if (!bit(block)) (durability == Durability::hard ? hard_blocks_ : soft_blocks_).add(block, end);
    block = end;
  }
  set_bits(blocks);
  if (durability == Durability::hard) promote_locked(stored);
}

bool Map::promote(GuestRange range) {
  {
    SharedLock lock(mutex_);
    if (soft_blocks_.empty() && soft_chunks_.empty()) return false;
  }
  ExclusiveLock lock(mutex_);
  promote_locked(range);
  return !hard_blocks_.empty() || !hard_chunks_.empty();
}

void Map::promote_locked(GuestRange range) {
  const Span blocks = blocks_of(range);
  while (const auto part = soft_blocks_.overlap(blocks.first, blocks.end)) {
    soft_blocks_.remove(part->first, part->second);
    hard_blocks_.add(part->first, part->second);
    // The bits must not be durable without the chunks that the whole blocks lie in.
    const Span chunks = chunks_of({GuestOffset(part->first * block_size_), (part->second - part->first) * block_size_});
    while (const auto soft = soft_chunks_.overlap(chunks.first, chunks.end)) {
      soft_chunks_.remove(soft->first, soft->second);
      hard_chunks_.add(soft->first, soft->second);
    }
  }
  const Span chunks = chunks_of(range);
  while (const auto part = soft_chunks_.overlap(chunks.first, chunks.end)) {
    soft_chunks_.remove(part->first, part->second);
    hard_chunks_.add(part->first, part->second);
  }
}

void Map::clear_blocks(GuestRange range) {
  ExclusiveLock lock(mutex_);
  const Span blocks = blocks_of(range);
  for (uint64_t block = blocks.first; block < blocks.end; ++block) {
    if (!bit(block)) continue;
    bits_[block / 8] = static_cast<uint8_t>(bits_[block / 8] & ~(1u << (block % 8)));
    ++missing_;
  }
  if (blocks.first < blocks.end) bitmap_pages_.add(blocks.first / 8 / kPage, (blocks.end - 1) / 8 / kPage + 1);
}

std::vector<uint32_t> Map::unmap_chunks(uint64_t first, uint64_t end) {
  ExclusiveLock lock(mutex_);
  std::vector<uint32_t> freed;
  for (uint64_t chunk = first; chunk < end; ++chunk) {
    if (table_[chunk] == kEmpty) continue;
    freed.push_back(table_[chunk]);
    table_[chunk] = kEmpty;
    --mapped_;
    table_pages_.add(chunk / kEntriesPerPage, chunk / kEntriesPerPage + 1);
  }
  return freed;
}

void Map::resize(const Header& header) {
  ExclusiveLock lock(mutex_);
  const uint64_t before = table_.size();
  for (uint64_t chunk = header.chunks(); chunk < before; ++chunk)
    if (table_[chunk] != kEmpty) --mapped_;
  table_.resize(header.chunks(), kEmpty);
  const bool used = base_end_ > 0;
  header_ = header;
  base_end_ = used ? header.base_end() : 0;
  bits_.resize(header.bitmap_bytes());
  missing_ = 0;
  for (uint64_t block = 0; block < header.blocks(); ++block)
    if (!bit(block)) ++missing_;
}

bool Map::base_is_left() const {
  SharedLock lock(mutex_);
  return base_left_;
}

void Map::set_base_left(bool left) {
  ExclusiveLock lock(mutex_);
  base_left_ = left;
}

bool Map::changed() const {
  SharedLock lock(mutex_);
  return !table_pages_.empty() || !bitmap_pages_.empty();
}

uint64_t Map::base_end() const {
  SharedLock lock(mutex_);
  return base_end_;
}

uint64_t Map::allocated() const {
  SharedLock lock(mutex_);
  if (chunk_size_ != 0) return mapped_ * chunk_size_;
  return header_.virtual_size - std::min(header_.virtual_size, missing_ * block_size_);
}

}  // namespace imgfuse::fvd
