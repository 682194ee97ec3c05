// The walk through an image that fills a Survey.
#pragma once

#include <fmt/core.h>

#include <algorithm>
#include <string>
#include <vector>

#include "core/findings.h"
#include "format/qcow2/entry_rules.h"
#include "format/qcow2/survey.h"

namespace imgfuse::qcow2 {

/// One walk; take_survey() calls its steps in order. survey.cc has the structures that the header points at,
/// survey_tables.cc what lies in L2 tables and bitmaps.
class Surveyor {
 public:
  /// Measures the file.
  static Result<Surveyor> start(Storage& storage, const Header& header, Findings& findings, Survey& survey);

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
    uint64_t times;                    // from all L1 tables
    uint64_t active;                   // from the active one
    std::optional<GuestOffset> guest;  // what it maps, where that matters
    uint64_t expected_next = 0;
  };

  Surveyor(Storage& storage, const Header& header, Findings& findings, Survey& survey)
      : storage_(storage),
        header_(header),
        findings_(findings),
        survey_(survey),
        format_(header.l2_format()),
        rules_(header, survey.file_size),
        cluster_size_(header.cluster_size()) {}

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
  void mark_bitmap(HostRange range);
  void note_flag_past_end(HostOffset host, bool copied, uint64_t active, const std::string& place);
  void visit_l1_entry(HostOffset at, uint64_t index, uint64_t raw, uint64_t times, bool active);
  void visit_l2_entry(Table& table, uint64_t index, L2Entry entry);
  void visit_compressed(const Table& table, uint64_t index, L2Entry entry);
  void visit_uncompressed(Table& table, uint64_t index, L2Entry entry);
  void visit_host(Table& table, uint64_t index, L2Entry entry);
  void visit_data_file_place(const Table& table, uint64_t index, L2Entry entry);
  void visit_bitmap_entry(HostOffset at, uint64_t raw, uint64_t times);

  static std::string place(const Table& table, uint64_t index) {
    return fmt::format("entry {} of the L2 table at {:#x}", index, table.offset.bytes());
  }
  std::optional<GuestOffset> guest_of(const Table& table, uint64_t index) const {
    if (!table.guest) return std::nullopt;
    return *table.guest + (index << header_.cluster_bits);
  }

  Storage& storage_;
  const Header& header_;
  Findings& findings_;
  Survey& survey_;
  const L2Format format_;
  const EntryRules rules_;
  const uint64_t cluster_size_;
};

/// False, and a finding, if the range passes the end of the file by a cluster or more: only the last cluster may be
/// there in part.
template <class Describe>
bool Surveyor::in_file(HostRange range, uint64_t times, const Describe& describe) {
  if (rules_.in_file(range)) return true;
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

template <class Describe>
bool Surveyor::count(HostRange range, uint64_t times, const Describe& describe) {
  if (!in_file(range, times, describe)) return false;
  add_references(range, times);
  return true;
}

}  // namespace imgfuse::qcow2
