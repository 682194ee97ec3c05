// The survey of L2 tables and bitmaps.
#include "base/math.h"
#include "format/qcow2/bitmap_directory.h"
#include "format/qcow2/surveyor.h"
#include "format/qcow2/table_scan.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint64_t kBitmapReserved = 0xff000000000001fe;
constexpr uint64_t kBitmapAllOnes = 1;  // only without an offset

}  // namespace

/// In the order of the file, each table once.
Result<> Surveyor::count_l2_tables() {
  findings_.report().total_clusters = divide_up(header_.size, cluster_size_);
  for (auto cluster = survey_.l2_tables.next(0); cluster; cluster = survey_.l2_tables.next(*cluster + 1)) {
    Table table{HostOffset(*cluster << header_.cluster_bits), survey_.l2_tables.get(*cluster),
                survey_.active_tables.get(*cluster), survey_.mapped_by(header_, *cluster)};
    IMG_TRY(scan_table(storage_, {table.offset, cluster_size_}, [&](uint64_t word, Entries words) {
      const uint64_t first = word * 8 / format_.entry_bytes();
      const uint64_t count = words.size_bytes() / format_.entry_bytes();
      for (uint64_t i = 0; i < count; ++i)
        if (const L2Entry entry = format_.load(std::as_bytes(words), i); entry != L2Entry{})
          visit_l2_entry(table, first + i, entry);
      return survey_.check_budget();
    }));
  }
  return {};
}

void Surveyor::visit_l2_entry(Table& table, uint64_t index, L2Entry entry) {
  if (rules_.mended(entry, {.guest = guest_of(table, index)}) != entry) ++survey_.mendable_entries;
  if (entry.raw & kCompressed) return visit_compressed(table, index, entry);
  visit_uncompressed(table, index, entry);
}

void Surveyor::visit_compressed(const Table& table, uint64_t index, L2Entry entry) {
  const auto describe = [&] { return place(table, index); };
  if (entry.copied()) findings_.corruption(table.times, "{} is compressed and has the COPIED flag set", describe());
  if (format_.data_file)
    return findings_.corruption(table.times, "{} is compressed, in an image with an external data file", describe());
  if (entry.bitmap != 0) {
    // Not counted, as QEMU does it. It can be read all the same: its clusters are no leaks.
    survey_.lost_references = true;
    return findings_.corruption(table.times, "{} is compressed and has subclusters: {:#018x}", describe(),
                                entry.bitmap);
  }
  const uint64_t address = entry.raw & ((uint64_t{1} << (70 - header_.cluster_bits)) - 1);
  if (address >= kMaxHostOffset)
    findings_.corruption(table.times, "{} is compressed and points at {:#x}, which is not below 2^56", describe(),
                         address);
  CheckReport& report = findings_.report();
  report.allocated_clusters += table.active;
  report.compressed_clusters += table.active;
  report.fragmented_clusters += table.active;
  const CompressedRange range = entry.compressed_range(header_.cluster_bits);
  count({range.offset, range.length}, table.times, describe);
}

void Surveyor::visit_uncompressed(Table& table, uint64_t index, L2Entry entry) {
  const auto describe = [&] { return place(table, index); };
  if (entry.raw & kL2Reserved)
    findings_.corruption(table.times, "{} has reserved bits set: {:#018x}", describe(), entry.raw);
  if (header_.version == 2 && (entry.raw & kZeroFlag))
    findings_.corruption(table.times, "{} has a zero flag, which version 2 does not know", describe());
  const uint64_t alloc = entry.bitmap & L2Format::kAllSubclusters;
  if (!rules_.names_host(entry)) {
    if (alloc != 0)
      findings_.corruption(table.times, "{} has subclusters without a host cluster: {:#018x}", describe(),
                           entry.bitmap);
    return;
  }
  if (alloc & entry.bitmap >> 32)
    findings_.corruption(table.times, "{} has subclusters that are both allocated and zero: {:#018x}", describe(),
                         entry.bitmap);
  visit_host(table, index, entry);
}

/// An entry with a place for plain bytes.
void Surveyor::visit_host(Table& table, uint64_t index, L2Entry entry) {
  CheckReport& report = findings_.report();
  const uint64_t host = entry.host().bytes();
  report.allocated_clusters += table.active;
  if (table.expected_next != 0 && host != table.expected_next) report.fragmented_clusters += table.active;
  table.expected_next = host + cluster_size_;

  const auto describe = [&] { return place(table, index); };
  if (host % cluster_size_ != 0)
    findings_.corruption(table.times, "{} points at {:#x}, which is not a multiple of the cluster size {}", describe(),
                         host, cluster_size_);
  if (format_.data_file) return visit_data_file_place(table, index, entry);
  if (!count({entry.host(), cluster_size_}, table.times, describe)) {
    if (table.active != 0) note_flag_past_end(entry.host(), entry.copied(), table.active, describe());
    return;
  }
  (entry.copied() ? survey_.copied : survey_.not_copied).add(host >> header_.cluster_bits, table.active);
}

/// Clusters of a data file have no counts: each belongs to its guest cluster alone.
void Surveyor::visit_data_file_place(const Table& table, uint64_t index, L2Entry entry) {
  if (!entry.copied())
    findings_.corruption(table.active, "{} points into the data file without the COPIED flag", place(table, index));
  const std::optional<GuestOffset> guest = guest_of(table, index);
  const uint64_t host = entry.host().bytes();
  if (guest && host % cluster_size_ == 0 && host != guest->bytes())
    findings_.corruption(table.active, "{} points at {:#x} of the data file, for guest offset {:#x}",
                         place(table, index), host, guest->bytes());
}

Result<> Surveyor::count_bitmaps() {
  auto directory = read_bitmap_directory(storage_, header_);
  if (!directory) {
    if (directory.error().code() != ErrorCode::corrupt) return fail(std::move(directory).error());
    findings_.corruption(1, "{}", directory.error().text());
    survey_.bad_bitmaps = survey_.lost_references = true;
    return {};
  }
  if (!*directory) return {};
  if (count_structure("the bitmap directory", (*directory)->range)) {
    mark_bitmap((*directory)->range);
  } else {
    survey_.bad_bitmaps = true;
  }
  std::vector<HostRange> tables;
  for (const HostRange& table : (*directory)->tables) {
    if (in_file(table, 1, [] { return "a bitmap table"; })) {
      tables.push_back(table);
    } else {
      survey_.bad_bitmaps = true;
    }
  }

  count_overlapping(tables);
  for (const Stretch& stretch : overlay(tables)) {
    mark_bitmap(stretch.range);
    IMG_TRY(scan_table(storage_, stretch.range, [&](uint64_t first, Entries entries) {
      for (size_t i = 0; i < entries.size(); ++i)
        if (entries[i] != 0) visit_bitmap_entry(stretch.range.begin + (first + i) * 8, entries[i], stretch.times);
      return survey_.check_budget();
    }));
  }
  return {};
}

void Surveyor::visit_bitmap_entry(HostOffset at, uint64_t raw, uint64_t times) {
  const uint64_t host = raw & kOffsetMask;
  const auto describe = [&] { return fmt::format("bitmap table entry at {:#x}", at.bytes()); };
  if ((raw & kBitmapReserved) || (host != 0 && (raw & kBitmapAllOnes)) || host % cluster_size_ != 0) {
    findings_.corruption(times, "{} is not valid: {:#018x}", describe(), raw);
    survey_.bad_bitmaps = true;
    return;
  }
  if (host == 0) return;
  const HostRange range{HostOffset(host), cluster_size_};
  if (count(range, times, describe)) {
    mark_bitmap(range);
  } else {
    survey_.bad_bitmaps = true;
  }
}

}  // namespace imgfuse::qcow2
