#include "format/qcow2/survey.h"

#include <algorithm>
#include <cstring>

#include "base/math.h"
#include "format/qcow2/l2_entry.h"
#include "format/qcow2/layout.h"
#include "format/qcow2/surveyor.h"
#include "format/qcow2/table_scan.h"

namespace imgfuse::qcow2 {

Result<Surveyor> Surveyor::start(Storage& storage, const Header& header, Findings& findings, Survey& survey) {
  IMG_LET(survey.file_size, storage.size());
  survey.file_clusters = divide_up(survey.file_size, header.cluster_size());
  if (survey.file_clusters > ReferenceCounts::kMaxClusters)
    return fail(ErrorCode::invalid, "the file has {} clusters, a check can count {}", survey.file_clusters,
                ReferenceCounts::kMaxClusters);
  return Surveyor(storage, header, findings, survey);
}

void Surveyor::add_references(HostRange range, uint64_t times) {
  for_clusters(range, [&](uint64_t cluster) { survey_.references.add(cluster, times); });
}

void Surveyor::mark_metadata(HostRange range) {
  for_clusters(range, [&](uint64_t cluster) {
    if (survey_.metadata.get(cluster) == 0) survey_.metadata.add(cluster);
  });
}

void Surveyor::mark_bitmap(HostRange range) {
  mark_metadata(range);
  for_clusters(range, [&](uint64_t cluster) {
    if (survey_.bitmaps.get(cluster) == 0) survey_.bitmaps.add(cluster);
  });
}

/// Where the file has lost its end, the counts of the lost clusters may still be there; farther out there are none.
void Surveyor::note_flag_past_end(HostOffset host, bool copied, uint64_t active, const std::string& place) {
  constexpr uint64_t kNear = 65536;
  const uint64_t cluster = host.bytes() >> header_.cluster_bits;
  if (cluster < survey_.file_clusters + kNear) {
    (copied ? survey_.copied : survey_.not_copied).add(cluster, active);
  } else if (copied) {
    findings_.corruption(active, "{} has the COPIED flag set", place);
  }
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
        if (entries[i] != 0)
          visit_l1_entry(begin + (first + i) * 8, (begin - active.begin) / 8 + first + i, entries[i], stretch.times,
                         is_active);
      return survey_.check_budget();
    }));
  }
  return {};
}

/// `index` means something in the active table only.
void Surveyor::visit_l1_entry(HostOffset at, uint64_t index, uint64_t raw, uint64_t times, bool active) {
  const auto describe = [&] { return fmt::format("L1 entry at {:#x}", at.bytes()); };
  if (raw & kL1Reserved) {
    findings_.corruption(times, "{} has reserved bits set: {:#018x}", describe(), raw);
    ++survey_.mendable_entries;
  }
  const L1Entry entry{raw};
  if (!entry.present()) {
    survey_.lost_references = true;  // the entry is not zero: it has meant something
    return;
  }
  if (entry.table().bytes() % cluster_size_ != 0) {
    findings_.corruption(times, "{} points at {:#x}, which is not a multiple of the cluster size {}", describe(),
                         entry.table().bytes(), cluster_size_);
    survey_.lost_references = true;
    ++survey_.mendable_entries;
    return;
  }
  if (!count({entry.table(), cluster_size_}, times, describe)) {
    if (active) note_flag_past_end(entry.table(), entry.copied(), 1, describe());
    ++survey_.mendable_entries;
    return;
  }
  const uint64_t cluster = entry.table().bytes() >> header_.cluster_bits;
  survey_.l2_tables.add(cluster, times);
  if (!active) return;
  if (format_.data_file && survey_.active_tables.get(cluster) == 0 && survey_.budget.take(Survey::kPlaceMemory))
    survey_.l1_index.emplace(cluster, index);
  survey_.active_tables.add(cluster);
  (entry.copied() ? survey_.copied : survey_.not_copied).add(cluster);
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

std::optional<GuestOffset> Survey::mapped_by(const Header& header, uint64_t table) const {
  const auto place = l1_index.find(table);
  if (place == l1_index.end() || active_tables.get(table) != 1) return std::nullopt;
  return GuestOffset(place->second * header.l2_coverage());
}

HostOffset Survey::refcount_block(const Header& header, uint64_t index) const {
  if (index >= refcount_table.size()) return HostOffset(0);
  const uint64_t block = refcount_table[index] & kRefcountTableMask;
  const bool usable = block % header.cluster_size() == 0 && block >> header.cluster_bits < file_clusters;
  return HostOffset(usable ? block : 0);
}

Result<> take_survey(Storage& storage, const Header& header, const SnapshotTable& snapshots,
                     RefcountStructures refcount_structures, Findings& findings, Survey& survey) {
  IMG_LET(Surveyor surveyor, Surveyor::start(storage, header, findings, survey));
  surveyor.count_structure("the header", {HostOffset(0), header.cluster_size()});
  if (header.has_data_file() && !snapshots.snapshots.empty())
    findings.corruption(1, "{} snapshots in an image with an external data file", snapshots.snapshots.size());
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
