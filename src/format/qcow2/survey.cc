#include "format/qcow2/survey.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "base/math.h"
#include "format/qcow2/bitmap_directory.h"
#include "format/qcow2/l2_entry.h"
#include "format/qcow2/layout.h"
#include "format/qcow2/table_scan.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint64_t kBitmapReserved = 0xff000000000001fe;
constexpr uint64_t kBitmapAllOnes = 1;  // only without an offset

class Surveyor {
 public:
  Surveyor(Storage& storage, const Header& header, Findings& findings, Survey& survey)
      : storage_(storage),
        header_(header),
        findings_(findings),
        survey_(survey),
        cluster_size_(header.cluster_size()) {}

  Result<> measure_file();
  Result<> count_l1_tables(const SnapshotTable& snapshots);
  Result<> count_l2_tables();
  Result<> count_bitmaps();
  void count_encryption_header();
  bool count_structure(const char* what, HostRange range);
  Result<> load_refcount_table();
  void count_refcount_blocks();

 private:
  /// An L2 table, and how often it is reached.
  struct Table {
    HostOffset offset;
    uint64_t times;   // from all L1 tables
    uint64_t active;  // from the active one
    uint64_t expected_next = 0;
  };

  template <class Describe>
  bool in_file(HostRange range, uint64_t times, const Describe& describe);
  template <class F>
  void for_clusters(HostRange range, F f);
  void add_references(HostRange range, uint64_t times);
  /// Both.
  template <class Describe>
  bool count(HostRange range, uint64_t times, const Describe& describe);
  void count_overlapping(const std::vector<HostRange>& tables);
  void mark_metadata(HostRange range);
  void visit_l1_entry(HostOffset at, uint64_t raw, uint64_t times, bool active);
  void visit_l2_entry(Table& table, uint64_t index, uint64_t raw);
  void visit_compressed(const Table& table, uint64_t index, uint64_t raw);
  void visit_standard(Table& table, uint64_t index, L2Entry entry);
  void visit_bitmap_entry(HostOffset at, uint64_t raw, uint64_t times);

  static std::string place(const Table& table, uint64_t index) {
    return fmt::format("entry {} of the L2 table at {:#x}", index, table.offset.bytes());
  }

  Storage& storage_;
  const Header& header_;
  Findings& findings_;
  Survey& survey_;
  const uint64_t cluster_size_;
};

Result<> Surveyor::measure_file() {
  IMG_LET(survey_.file_size, storage_.size());
  survey_.file_clusters = divide_up(survey_.file_size, cluster_size_);
  if (survey_.file_clusters > ReferenceCounts::kMaxClusters)
    return fail(ErrorCode::invalid, "the file has {} clusters, a check can count {}", survey_.file_clusters,
                ReferenceCounts::kMaxClusters);
  return {};
}

/// False, and a finding, if the range passes the end of the file by a cluster or more: only the last cluster may be
/// there in part.
template <class Describe>
bool Surveyor::in_file(HostRange range, uint64_t times, const Describe& describe) {
  const auto end = checked_add(range.begin.bytes(), range.length);
  if (end && (*end <= survey_.file_size || *end - survey_.file_size < cluster_size_)) return true;
  findings_.corruption(times, "{} points at {:#x}, past the end of the file ({:#x})", describe(), range.begin.bytes(),
                       survey_.file_size);
  survey_.lost_references = true;
  return false;
}

/// Calls `f` for every cluster that the range touches.
template <class F>
void Surveyor::for_clusters(HostRange range, F f) {
  if (range.empty()) return;
  const uint64_t last = (range.end().bytes() - 1) >> header_.cluster_bits;
  for (uint64_t c = range.begin.bytes() >> header_.cluster_bits; c <= last && !survey_.budget.exhausted(); ++c) f(c);
}

void Surveyor::add_references(HostRange range, uint64_t times) {
  for_clusters(range, [&](uint64_t cluster) { survey_.references.add(cluster, times); });
}

template <class Describe>
bool Surveyor::count(HostRange range, uint64_t times, const Describe& describe) {
  if (!in_file(range, times, describe)) return false;
  add_references(range, times);
  return true;
}

void Surveyor::mark_metadata(HostRange range) {
  for_clusters(range, [&](uint64_t cluster) {
    if (survey_.metadata.get(cluster) == 0) survey_.metadata.add(cluster);
  });
}

/// The clusters of tables that may overlap. Each cluster is visited once.
void Surveyor::count_overlapping(const std::vector<HostRange>& tables) {
  std::vector<HostRange> clusters;
  clusters.reserve(tables.size());
  for (const HostRange& table : tables) clusters.push_back({table.begin, round_up(table.length, cluster_size_)});
  for (const Stretch& stretch : overlay(clusters)) {
    add_references(stretch.range, stretch.times);
    mark_metadata(stretch.range);
  }
}

bool Surveyor::count_structure(const char* what, HostRange range) {
  if (!count(range, 1, [&] { return what; })) return false;
  mark_metadata(range);
  return true;
}

/// Counts the L1 tables themselves and what their entries point at. Snapshots' tables may overlap each other and the
/// active one, so all are laid over each other first.
Result<> Surveyor::count_l1_tables(const SnapshotTable& snapshots) {
  std::vector<HostRange> tables;  // that can be followed
  const auto add = [&](HostRange table, const auto& describe) {
    if (table.empty()) return;
    if (in_file(table, 1, describe)) tables.push_back(table);
  };
  const HostRange active{header_.l1_offset, uint64_t{header_.l1_entries} * 8};
  add(active, [] { return "the L1 table"; });
  for (const Snapshot& snapshot : snapshots.snapshots) {
    if (const Result<> usable = check_snapshot_l1(header_, snapshot); !usable) {
      findings_.corruption(1, "{}", usable.error().text());
      survey_.lost_references = true;
      continue;
    }
    add(snapshot.l1(), [&] { return fmt::format("snapshot {}: its L1 table", snapshot.info.id); });
  }

  count_overlapping(tables);
  for (const Stretch& stretch : overlay(tables)) {
    const HostOffset begin = stretch.range.begin;
    const bool is_active = active.contains(begin);
    IMG_TRY(scan_table(storage_, stretch.range, [&](uint64_t first, Entries entries) {
      for (size_t i = 0; i < entries.size(); ++i)
        if (entries[i] != 0) visit_l1_entry(begin + (first + i) * 8, entries[i], stretch.times, is_active);
      return survey_.check_budget();
    }));
  }
  return {};
}

void Surveyor::visit_l1_entry(HostOffset at, uint64_t raw, uint64_t times, bool active) {
  const auto describe = [&] { return fmt::format("L1 entry at {:#x}", at.bytes()); };
  if (raw & kL1Reserved) findings_.corruption(times, "{} has reserved bits set: {:#018x}", describe(), raw);
  const L1Entry entry{raw};
  if (!entry.present()) {
    survey_.lost_references = true;  // the entry is not zero: it has meant something
    return;
  }
  if (entry.table().bytes() % cluster_size_ != 0) {
    findings_.corruption(times, "{} points at {:#x}, which is not a multiple of the cluster size {}", describe(),
                         entry.table().bytes(), cluster_size_);
    survey_.lost_references = true;
    return;
  }
  if (!count({entry.table(), cluster_size_}, times, describe)) {
    if (active && entry.copied()) findings_.corruption(1, "{} has the COPIED flag set", describe());
    return;
  }
  const uint64_t cluster = entry.table().bytes() >> header_.cluster_bits;
  survey_.l2_tables.add(cluster, times);
  if (!active) return;
  survey_.active_tables.add(cluster);
  (entry.copied() ? survey_.copied : survey_.not_copied).add(cluster);
}

/// In the order of the file, each table once.
Result<> Surveyor::count_l2_tables() {
  findings_.report().total_clusters = divide_up(header_.size, cluster_size_);
  for (auto cluster = survey_.l2_tables.next(0); cluster; cluster = survey_.l2_tables.next(*cluster + 1)) {
    Table table{HostOffset(*cluster << header_.cluster_bits), survey_.l2_tables.get(*cluster),
                survey_.active_tables.get(*cluster)};
    IMG_TRY(scan_table(storage_, {table.offset, cluster_size_}, [&](uint64_t first, Entries entries) {
      for (size_t i = 0; i < entries.size(); ++i)
        if (entries[i] != 0) visit_l2_entry(table, first + i, entries[i]);
      return survey_.check_budget();
    }));
  }
  return {};
}

void Surveyor::visit_l2_entry(Table& table, uint64_t index, uint64_t raw) {
  const L2Entry entry{raw};
  if (entry.kind() == ClusterKind::compressed) return visit_compressed(table, index, raw);
  if (raw & kL2Reserved)
    findings_.corruption(table.times, "{} has reserved bits set: {:#018x}", place(table, index), raw);
  if (header_.version == 2 && (raw & kZeroFlag))
    findings_.corruption(table.times, "{} has a zero flag, which version 2 does not know", place(table, index));
  if (entry.holds_host()) visit_standard(table, index, entry);
}

void Surveyor::visit_compressed(const Table& table, uint64_t index, uint64_t raw) {
  const L2Entry entry{raw};
  CheckReport& report = findings_.report();
  report.allocated_clusters += table.active;
  report.compressed_clusters += table.active;
  report.fragmented_clusters += table.active;
  const uint64_t address = raw & ((uint64_t{1} << (70 - header_.cluster_bits)) - 1);
  if (address >= kMaxHostOffset)
    findings_.corruption(table.times, "{} is compressed and points at {:#x}, which is not below 2^56",
                         place(table, index), address);
  if (entry.copied()) {
    findings_.corruption(table.times, "{} is compressed and has the COPIED flag set", place(table, index));
    ++survey_.mendable_entries;
  }
  const CompressedRange range = entry.compressed_range(header_.cluster_bits);
  count({range.offset, range.length}, table.times, [&] { return place(table, index); });
}

/// A normal or zero-allocated cluster.
void Surveyor::visit_standard(Table& table, uint64_t index, L2Entry entry) {
  CheckReport& report = findings_.report();
  const uint64_t host = entry.host().bytes();
  report.allocated_clusters += table.active;
  if (table.expected_next != 0 && host != table.expected_next) report.fragmented_clusters += table.active;
  table.expected_next = host + cluster_size_;

  const auto describe = [&] { return place(table, index); };
  if (host % cluster_size_ != 0) {
    findings_.corruption(table.times, "{} points at {:#x}, which is not a multiple of the cluster size {}", describe(),
                         host, cluster_size_);
    if (entry.kind() == ClusterKind::zero_allocated) ++survey_.mendable_entries;
  }
  if (!count({entry.host(), cluster_size_}, table.times, describe)) {
    if (entry.copied() && table.active != 0)
      findings_.corruption(table.active, "{} has the COPIED flag set", describe());
    return;
  }
  (entry.copied() ? survey_.copied : survey_.not_copied).add(host >> header_.cluster_bits, table.active);
}

void Surveyor::count_encryption_header() {
  for (const Extension& extension : header_.extensions) {
    if (extension.type != wire::kExtensionEncryption) continue;
    wire::EncryptionExtension raw;
    std::memcpy(&raw, extension.data.data(), sizeof raw);  // the header was refused if it had another length
    if (raw.offset % cluster_size_ != 0)
      findings_.corruption(1, "the encryption header's offset {:#x} is not a multiple of the cluster size {}",
                           uint64_t{raw.offset}, cluster_size_);
    count_structure("the encryption header", {HostOffset(raw.offset), raw.length});
  }
}

Result<> Surveyor::count_bitmaps() {
  auto directory = read_bitmap_directory(storage_, header_);
  if (!directory) {
    if (directory.error().code() != ErrorCode::corrupt) return fail(std::move(directory).error());
    findings_.corruption(1, "{}", directory.error().text());
    survey_.lost_references = true;
    return {};
  }
  if (!*directory) return {};
  count_structure("the bitmap directory", (*directory)->range);
  std::vector<HostRange> tables;
  for (const HostRange& table : (*directory)->tables)
    if (in_file(table, 1, [] { return "a bitmap table"; })) tables.push_back(table);

  count_overlapping(tables);
  for (const Stretch& stretch : overlay(tables)) {
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
    return;
  }
  if (host == 0) return;
  const HostRange range{HostOffset(host), cluster_size_};
  if (count(range, times, describe)) mark_metadata(range);
}

/// At most 8 MiB, as the header's check has made sure.
Result<> Surveyor::load_refcount_table() {
  const uint64_t bytes = header_.refcount_table_clusters * cluster_size_;
  if (!survey_.budget.take(bytes)) return survey_.check_budget();
  survey_.refcount_table.assign(bytes / 8, 0);
  return scan_table(storage_, {header_.refcount_table_offset, bytes}, [&](uint64_t first, Entries entries) {
    std::copy(entries.begin(), entries.end(), survey_.refcount_table.begin() + static_cast<ptrdiff_t>(first));
    return Result<>{};
  });
}

/// Comes last: a block that anything else refers to is no refcount block.
void Surveyor::count_refcount_blocks() {
  for (uint64_t i = 0; i < survey_.refcount_table.size(); ++i) {
    const uint64_t raw = survey_.refcount_table[i];
    if (raw == 0) continue;
    const HostOffset block(raw & kRefcountTableMask);
    const uint64_t cluster = block.bytes() >> header_.cluster_bits;
    bool sound = false;
    if (raw & kRefcountTableReserved) {
      findings_.corruption(1, "refcount table entry {} has reserved bits set: {:#018x}", i, raw);
    } else if (block.bytes() % cluster_size_ != 0) {
      findings_.corruption(1, "refcount table entry {} points at {:#x}, which is not a multiple of the cluster size {}",
                           i, raw, cluster_size_);
    } else if (cluster >= survey_.file_clusters) {
      findings_.corruption(1, "refcount table entry {} points at {:#x}, past the end of the file ({:#x})", i, raw,
                           survey_.file_size);
    } else {
      count_structure("a refcount block", {block, cluster_size_});
      const uint64_t references = survey_.references.get(cluster);
      sound = references == 1;
      if (!sound)
        findings_.corruption(1, "refcount block {} at {:#x} has {} references instead of 1", i, raw, references);
    }
    if (!sound) survey_.must_rebuild = true;
  }
}

}  // namespace

Result<> Survey::check_budget() const {
  if (!budget.exhausted()) return {};
  return fail(ErrorCode::no_space, "counting the references of this image takes more than {} MiB of memory",
              kMemory >> 20);
}

bool Survey::metadata_overlaps(uint64_t cluster) const {
  const uint64_t tables = l2_tables.get(cluster);
  const bool holds_metadata = tables != 0 || metadata.get(cluster) != 0;
  return holds_metadata && references.get(cluster) > std::max<uint64_t>(tables, 1);
}

HostOffset Survey::refcount_block(const Header& header, uint64_t index) const {
  if (index >= refcount_table.size()) return HostOffset(0);
  const uint64_t block = refcount_table[index] & kRefcountTableMask;
  const bool usable = block % header.cluster_size() == 0 && block >> header.cluster_bits < file_clusters;
  return HostOffset(usable ? block : 0);
}

Result<> take_survey(Storage& storage, const Header& header, const SnapshotTable& snapshots,
                     RefcountStructures refcount_structures, Findings& findings, Survey& survey) {
  Surveyor surveyor(storage, header, findings, survey);
  IMG_TRY(surveyor.measure_file());
  surveyor.count_structure("the header", {HostOffset(0), header.cluster_size()});
  IMG_TRY(surveyor.count_l1_tables(snapshots));
  IMG_TRY(surveyor.count_l2_tables());
  surveyor.count_structure("the snapshot table", {header.snapshots_offset, snapshots.length});
  surveyor.count_encryption_header();
  IMG_TRY(surveyor.count_bitmaps());
  IMG_TRY(surveyor.load_refcount_table());
  if (refcount_structures == RefcountStructures::counted) {
    const HostRange table{header.refcount_table_offset, header.refcount_table_clusters * header.cluster_size()};
    if (!surveyor.count_structure("the refcount table", table)) survey.must_rebuild = true;
    surveyor.count_refcount_blocks();
  }
  return survey.check_budget();
}

}  // namespace imgfuse::qcow2
