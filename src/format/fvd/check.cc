// Check and repair: what table, bitmap and journal say, held against each other and against the file.
#include <algorithm>
#include <limits>

#include "base/buffer.h"
#include "core/findings.h"
#include "core/host_space.h"
#include "format/fvd/chunks.h"
#include "format/fvd/fvd.h"
#include "format/fvd/header.h"
#include "format/fvd/journal.h"
#include "format/fvd/map.h"

namespace imgfuse::fvd {
namespace {

/// One look at an image.
class Check {
 public:
  Check(Storage& storage, const Header& header, Repair repair, const CheckSink& sink)
      : storage_(storage), header_(header), map_(header), repair_(repair), findings_(report_, sink) {}

  Result<CheckReport> run();

 private:
  Result<> check_shutdown();
  Result<> check_entries();
  void tell_duplicates();
  Result<> check_leaks();
  Result<uint64_t> skip_holes(uint64_t chunk, uint64_t end);
  Result<bool> holds_data(HostRange range);
  Result<> check_padding();
  Result<> write_out();

  /// What was just reported is no more.
  void mend_corruption() {
    --report_.corruptions;
    ++report_.corruptions_fixed;
  }
  void mend_leak() {
    --report_.leaks;
    ++report_.leaks_fixed;
  }

  /// Where these chunks lie, as far as the file goes.
  HostRange chunks(uint64_t first, uint64_t end) const {
    const uint64_t begin = std::min(header_.data_start() + first * header_.chunk_size, file_size_);
    return {HostOffset(begin), std::min(header_.data_start() + end * header_.chunk_size, file_size_) - begin};
  }

  Storage& storage_;
  const Header& header_;
  Map map_;
  const Repair repair_;
  CheckReport report_;
  Findings findings_;
  bool declare_clean_ = false;
  uint64_t file_size_ = 0;
};

Result<CheckReport> Check::run() {
  IMG_TRY(map_.load(storage_));
  IMG_TRY(check_shutdown());
  IMG_TRY(check_entries());
  if (repair_ != Repair::none && report_.check_errors == 0) IMG_TRY(write_out());
  IMG_TRY(check_padding());
  IMG_TRY(check_leaks());
  report_.total_clusters = header_.compact ? header_.chunks() : header_.blocks();
  report_.allocated_clusters = header_.compact       ? map_.allocated() / header_.chunk_size
                               : header_.uses_base() ? divide_up(map_.allocated(), header_.block_size)
                                                     : 0;
  IMG_LET(report_.image_end_offset, storage_.size());
  return report_;
}

Result<> Check::check_shutdown() {
  if (header_.clean_shutdown) return {};
  if (header_.journal_sectors() > 0) {
    const Result<> replayed = map_.replay(storage_);
    if (replayed) {
      declare_clean_ = true;
      return {};
    }
    if (replayed.error().code() != ErrorCode::corrupt) return replayed;
    findings_.corruption(1, "{}", replayed.error().text());
    ++report_.check_errors;  // what the journal says behind that is not known
    return {};
  }
  if (!header_.compact && !header_.uses_base()) {
    declare_clean_ = true;
    return {};
  }
  findings_.corruption(1, "the image was not closed cleanly and has no journal: its last changes may be lost");
  if (repair_ != Repair::all) return {};
  declare_clean_ = true;
  mend_corruption();
  return {};
}

Result<> Check::check_entries() {
  if (!header_.compact) return {};
  IMG_LET(const uint64_t size, storage_.size());
  const bool looks_at_data = header_.data_name.empty();
  const uint64_t in_file =
      size <= header_.data_start() ? 0 : divide_up(size - header_.data_start(), header_.chunk_size);
  const TableSurvey found = survey(map_.table(), 0);
  if (found.duplicate) tell_duplicates();
  if (!looks_at_data) return check_reach(header_, found.next);
  for (uint64_t index = 0; found.next > in_file && index < map_.table().size(); ++index) {
    const uint32_t physical = map_.table()[index];
    if (physical == kEmpty || physical < in_file) continue;
    findings_.corruption(1, "table entry {} claims chunk {}, past the end of the file ({:#x})", index, physical, size);
    if (repair_ != Repair::all) continue;
    map_.unmap_chunks(index, index + 1);  // it reads as zeros as before
    mend_corruption();
  }
  return {};
}

void Check::tell_duplicates() {
  std::vector<std::pair<uint32_t, uint64_t>> used;
  for (uint64_t i = 0; i < map_.table().size(); ++i)
    if (map_.table()[i] != kEmpty) used.emplace_back(map_.table()[i], i);
  std::sort(used.begin(), used.end());
  for (size_t i = 1; i < used.size(); ++i) {
    if (used[i].first != used[i - 1].first) continue;
    findings_.corruption(1, "table entries {} and {} claim chunk {}", used[i - 1].second, used[i].second,
                         used[i].first);
  }
}

/// The next chunk from `chunk` on, below `end`, that is not all hole.
Result<uint64_t> Check::skip_holes(uint64_t chunk, uint64_t end) {
  const HostRange rest = chunks(chunk, end);
  if (rest.empty()) return end;
  IMG_LET(const StorageExtent piece, storage_.extent(rest));
  if (piece.data) return chunk;
  return piece.length >= rest.length ? end : chunk + piece.length / header_.chunk_size;
}

Result<bool> Check::holds_data(HostRange range) {
  Buffer buffer(std::min<uint64_t>(range.length, 1 << 20));
  while (!range.empty()) {
    IMG_LET(const StorageExtent piece, storage_.extent(range));
    uint64_t length = piece.length;
    if (piece.data) {
      length = std::min<uint64_t>(length, buffer.size());
      IMG_TRY(storage_.read(range.begin, buffer.bytes().first(length)));
      if (!is_zero(buffer.bytes().first(length))) return true;
    }
    range = {range.begin + length, range.length - length};
  }
  return false;
}

/// Chunks that no entry refers to. Those that read as zeros are as good as new.
Result<> Check::check_leaks() {
  if (!header_.compact || !header_.data_name.empty() || report_.corruptions > 0) return {};
  IMG_LET(const uint64_t size, storage_.size());
  TableSurvey found = survey(map_.table(), std::numeric_limits<size_t>::max());
  file_size_ = size;
  if (storage_.info().extensible && size > header_.data_start())  // a device may hold anything behind the last chunk
    found.leaked.add(found.next, divide_up(size - header_.data_start(), header_.chunk_size));
  for (const auto& [first, end] : found.leaked) {
    for (uint64_t chunk = first;; ++chunk) {
      if (chunk < end) {
        IMG_LET(chunk, skip_holes(chunk, end));
      }
      if (chunk >= end) break;
      const HostRange range = chunks(chunk, chunk + 1);
      IMG_LET(const bool used, holds_data(range));
      if (!used) continue;
      findings_.leak("chunk {} belongs to nobody and holds data", chunk);
      if (repair_ == Repair::none) continue;
      IMG_TRY(zero_and_free(storage_, range));
      mend_leak();
    }
  }
  return {};
}

/// Bits behind the last block mean nothing; other programs leave them zero.
Result<> Check::check_padding() {
  if (!header_.uses_base() || header_.blocks() == 0) return {};
  const uint64_t blocks = header_.blocks();
  if (blocks % 8 == 0) return {};
  const HostOffset last(header_.bitmap_offset + blocks / 8);
  std::byte bits;
  IMG_TRY(storage_.read(last, Bytes(&bits, 1)));
  const std::byte mask = std::byte(0xff << (blocks % 8));
  if ((bits & mask) == std::byte{0}) return {};
  findings_.leak("bits of the bitmap behind its last block are set");
  if (repair_ == Repair::none) return {};
  bits &= ~mask;
  IMG_TRY(storage_.write(last, ConstBytes(&bits, 1)));
  mend_leak();
  return {};
}

/// As a clean close: table, bitmap, an empty journal, and the header.
Result<> Check::write_out() {
  if (!declare_clean_ && !map_.changed()) return {};
  const MapCut cut = map_.cut(0, true, Map::WithBase::keep);
  for (const PageCopy& page : cut.table) IMG_TRY(storage_.write(page.where, page.bytes));
  IMG_TRY(storage_.flush());
  for (const PageCopy& page : cut.bitmap) IMG_TRY(storage_.write(page.where, page.bytes));
  IMG_TRY(storage_.flush());
  IMG_TRY(clear_journal(storage_, HostOffset(header_.journal_offset), header_.journal_sectors()));
  IMG_TRY(storage_.flush());
  if (declare_clean_) IMG_TRY(write_field<uint32_t>(storage_, kCleanField, 1));
  return storage_.flush();
}

}  // namespace

Result<CheckReport> check(Storage& storage, Repair repair, const CheckSink& sink) {
  IMG_LET(const Header header, read_header(storage));
  return Check(storage, header, repair, sink).run();
}

}  // namespace imgfuse::fvd
