// Checking: every pointer is followed once, and has to lead to a place of its own.
#include <string_view>

#include "base/endian.h"
#include "base/math.h"
#include "core/findings.h"
#include "core/sparse_bitmap.h"
#include "core/table_scan.h"
#include "format/qed/header.h"
#include "format/qed/map.h"
#include "format/qed/qed.h"

namespace imgfuse::qed {
namespace {

constexpr uint64_t kMaxMemory = uint64_t{160} << 20;

using Entries = std::span<le<uint64_t>>;
enum class BadEntries { removed, kept };

/// Looks at the image once. Tables do not overlap, or they are not followed, so each byte of the file is read once at
/// most, whatever the image claims.
class Checker {
 public:
  Checker(Storage& storage, const Header& header, HostOffset end, BadEntries bad_entries, Findings& findings)
      : storage_(storage), header_(header), end_(end), bad_entries_(bad_entries), findings_(findings) {}

  Result<> run() {
    report().total_clusters = divide_up(header_.image_size, header_.cluster_size);
    IMG_TRY(mark({HostOffset(0), header_.first_cluster().bytes()}));
    IMG_TRY(mark({header_.l1_offset, header_.table_bytes()}));
    IMG_TRY(edit_table<std::endian::little>(storage_, {header_.l1_offset, header_.table_bytes()}, TableHoles::skipped,
                                            [&](uint64_t first, Entries entries) { return visit_l1(first, entries); }));
    if (report().check_errors == 0) count_leaks();
    return {};
  }

 private:
  CheckReport& report() { return findings_.report(); }

  /// Returns how many of the clusters something else has too.
  Result<uint64_t> mark(HostRange range) {
    uint64_t shared = 0;
    for (uint64_t at = 0; at < range.length; at += header_.cluster_size) {
      IMG_LET(const bool is_new, used_.add((range.begin + at).bytes() / header_.cluster_size));
      shared += !is_new;
    }
    return shared;
  }

  /// An entry that leads nowhere. Returns whether it was removed.
  bool bad(std::string_view table, uint64_t index, le<uint64_t>& entry) {
    findings_.corruption(1, "{} {} is {:#x}, which is no place in a file of {:#x} with clusters of {}", table, index,
                         uint64_t{entry}, end_.bytes(), header_.cluster_size);
    if (bad_entries_ == BadEntries::kept) return false;
    entry = kUnallocated;
    --report().corruptions;
    ++report().corruptions_fixed;
    return true;
  }

  Result<bool> visit_l1(uint64_t first, Entries entries) {
    bool changed = false;
    for (uint64_t i = 0; i < entries.size(); ++i) {
      if (entries[i] == kUnallocated) continue;
      const HostRange table{HostOffset(entries[i]), header_.table_bytes()};
      if (!is_place(header_, table.begin, table.length, end_)) {
        changed = bad("L1 entry", first + i, entries[i]) || changed;
        continue;
      }
      IMG_LET(const uint64_t shared, mark(table));
      if (shared > 0) {
        findings_.corruption(shared, "L1 entry {} is {:#x}, where something else lies", first + i, table.begin.bytes());
        continue;
      }
      last_ = HostOffset(0);
      const Result<> read = edit_table<std::endian::little>(
          storage_, table, TableHoles::skipped,
          [&](uint64_t first_entry, Entries part) { return visit_l2(first + i, first_entry, part); });
      if (!read && read.error().code() != ErrorCode::io) return fail(read.error());
      if (!read) findings_.error("L2 table at {:#x}: {}", table.begin.bytes(), read.error().text());
    }
    return changed;
  }

  Result<bool> visit_l2(uint64_t l1_index, uint64_t first, Entries entries) {
    bool changed = false;
    for (uint64_t i = 0; i < entries.size(); ++i) {
      const HostOffset host(entries[i]);
      if (entries[i] == kUnallocated || entries[i] == kZeroCluster) continue;
      const uint64_t index = l1_index * header_.table_entries() + first + i;
      ++report().allocated_clusters;
      if (last_ != HostOffset(0) && host != last_ + header_.cluster_size) ++report().fragmented_clusters;
      last_ = host;
      if (!is_place(header_, host, header_.cluster_size, end_)) {
        changed = bad("L2 entry of guest cluster", index, entries[i]) || changed;
        continue;
      }
      IMG_LET(const uint64_t shared, mark({host, header_.cluster_size}));
      if (shared > 0)
        findings_.corruption(1, "L2 entry of guest cluster {} is {:#x}, where something else lies", index,
                             host.bytes());
    }
    return changed;
  }

  void count_leaks() {
    const uint64_t clusters = end_.bytes() / header_.cluster_size;
    report().leaks = clusters - used_.count();
  }

  Storage& storage_;
  const Header& header_;
  const HostOffset end_;
  const BadEntries bad_entries_;
  Findings& findings_;
  SparseBitmap used_{kMaxMemory};
  HostOffset last_;  // of the data clusters of this table; 0: it had none yet
};

}  // namespace

Result<CheckReport> check(Storage& storage, Repair mode, const CheckSink& sink) {
  IMG_LET(Header header, read_header(storage));
  if (mode != Repair::none) IMG_TRY(clear_autoclear_features(storage, header));
  IMG_LET(const HostOffset end, end_of_file(storage, header.cluster_size));
  CheckReport report;
  Findings findings(report, sink);
  const BadEntries bad_entries = mode == Repair::all ? BadEntries::removed : BadEntries::kept;
  IMG_TRY(Checker(storage, header, end, bad_entries, findings).run());
  if (mode == Repair::none || report.corruptions > 0 || report.check_errors > 0) return report;
  if ((header.features & kNeedCheck) == 0) return report;
  IMG_TRY(storage.flush());
  header.features &= ~kNeedCheck;
  IMG_TRY(write_header(storage, header));
  IMG_TRY(storage.flush());
  return report;
}

}  // namespace imgfuse::qed
