#include "format/qcow2/mend.h"

#include <algorithm>
#include <span>
#include <vector>

#include "base/math.h"
#include "format/qcow2/entry_rules.h"
#include "format/qcow2/table_scan.h"

namespace imgfuse::qcow2 {
namespace {

class Mender {
 public:
  Mender(Storage& storage, const Header& header, Repair mode, Examination& found)
      : storage_(storage),
        header_(header),
        format_(header.l2_format()),
        all_(mode == Repair::all && !found.keep_entries),
        found_(found),
        survey_(*found.survey),
        rules_(header, survey_.file_size) {}

  bool has_wrong_flags() const;
  bool has_bad_bitmaps() const;
  Result<> drop(uint64_t autoclear);
  Result<> mend_l1_tables();
  Result<> mend_l2_tables();

 private:
  /// An L2 table in use.
  struct Table {
    uint64_t times;   // from all L1 tables
    uint64_t active;  // from the active one
    std::optional<GuestOffset> guest;
  };

  uint64_t cluster_of(HostOffset host) const { return host.bytes() >> header_.cluster_bits; }
  bool copied_wanted(HostOffset host) const { return survey_.references.get(cluster_of(host)) == 1; }
  bool overlaps(HostRange range) const;
  std::vector<HostRange> l1_tables() const;
  uint64_t users_of(HostOffset host) const;
  bool mend_l1_entry(be<uint64_t>& raw, bool active) const;
  L1Entry mended_l1_entry(L1Entry entry) const;
  L2Entry mended_l2_entry(L2Entry entry, const Table& table, uint64_t index) const;

  Storage& storage_;
  const Header& header_;
  const L2Format format_;
  const bool all_;
  Examination& found_;
  Survey& survey_;
  const EntryRules rules_;
  uint64_t autoclear_ = header_.autoclear;
};

/// Against the counts as they will be, not as they were found.
bool Mender::has_wrong_flags() const {
  for (auto c = survey_.copied.next(0); c; c = survey_.copied.next(*c + 1))
    if (survey_.references.get(*c) != 1) return true;
  for (auto c = survey_.not_copied.next(0); c; c = survey_.not_copied.next(*c + 1))
    if (survey_.references.get(*c) == 1) return true;
  return false;
}

/// Something is wrong with a bitmap by itself, or something else lies in its clusters; and it may be put right.
bool Mender::has_bad_bitmaps() const {
  if (!all_ || (header_.autoclear & kBitmaps) == 0) return false;
  if (survey_.bad_bitmaps) return true;
  const ReferenceCounts& bitmaps = survey_.bitmaps;
  for (auto c = bitmaps.next(0); c; c = bitmaps.next(*c + 1))
    if (survey_.references.get(*c) - survey_.unexplained.get(*c) > 1) return true;
  return false;
}

/// One wrong bit in a bitmap loses data in a backup, so none of them is believed any more. The header says so, in the
/// way in which every program that does not keep them up to date says it.
Result<> Mender::drop(uint64_t autoclear) {
  if ((autoclear_ & autoclear) == 0) return {};
  autoclear_ &= ~autoclear;
  const be<uint64_t> field = autoclear_;
  IMG_TRY(storage_.write(kAutoclearField, std::as_bytes(std::span(&field, 1))));
  return storage_.flush();
}

/// Something else lies in the range, so that nothing may be written there.
bool Mender::overlaps(HostRange range) const {
  const uint64_t last = cluster_of(range.end() - 1);
  for (uint64_t c = cluster_of(range.begin); c <= last; ++c)
    if (survey_.metadata_overlaps(c)) return true;
  return false;
}

/// Those that the survey followed: the active one, and with Repair::all the snapshots'.
std::vector<HostRange> Mender::l1_tables() const {
  std::vector<HostRange> tables;
  const auto add = [&](HostRange table) {
    if (!table.empty() && rules_.in_file(table)) tables.push_back(table);
  };
  add({header_.l1_offset, uint64_t{header_.l1_entries} * 8});
  for (const Snapshot& snapshot : found_.snapshots.snapshots)
    if (all_ && check_snapshot_l1(header_, snapshot)) add(snapshot.l1());
  return tables;
}

/// How many references lead to the cluster that the offset lies in.
uint64_t Mender::users_of(HostOffset host) const {
  const uint64_t cluster = cluster_of(host);
  return survey_.references.get(cluster) - survey_.unexplained.get(cluster);
}

/// A table that is lost reads as if it were not there, which may be done only where nothing lies below.
L1Entry Mender::mended_l1_entry(L1Entry entry) const {
  const L1Entry lost = header_.backing_name ? entry : L1Entry{};
  const L1Entry clean{entry.raw & ~kL1Reserved};
  const uint64_t skew = clean.table().bytes() % header_.cluster_size();
  const L1Entry aligned{clean.raw - skew};
  if (aligned.present() && !rules_.in_file({aligned.table(), header_.cluster_size()})) return lost;
  if (skew == 0) return clean;
  // In use, but by nobody who could be followed.
  const bool unexplained = survey_.unexplained.get(cluster_of(aligned.table())) != 0;
  return unexplained && users_of(aligned.table()) == 0 ? aligned : lost;
}

bool Mender::mend_l1_entry(be<uint64_t>& raw, bool active) const {
  L1Entry entry{raw};
  if (entry.raw == 0) return false;
  if (all_) entry = mended_l1_entry(entry);
  // A table that was not followed gets its flag in the next round.
  if (active && entry.present() && survey_.active_tables.get(cluster_of(entry.table())) != 0)
    entry.raw = copied_wanted(entry.table()) ? entry.raw | kCopied : entry.raw & ~kCopied;
  const bool changed = entry.raw != raw;
  raw = entry.raw;
  return changed;
}

/// However often snapshots' tables overlap, each is visited once.
Result<> Mender::mend_l1_tables() {
  // What an entry is mended to is a change of the disk that no bitmap has recorded, and no raw data file has seen.
  if (all_ && survey_.mendable_entries > 0) IMG_TRY(drop(kBitmaps | kRawDataFile));
  const HostRange active{header_.l1_offset, uint64_t{header_.l1_entries} * 8};
  for (const Stretch& stretch : overlay(l1_tables())) {
    if (overlaps(stretch.range)) continue;
    const bool is_active = active.contains(stretch.range.begin);
    IMG_TRY(edit_table(storage_, stretch.range, [&](uint64_t, Entries entries) {
      bool changed = false;
      for (be<uint64_t>& raw : entries) changed |= mend_l1_entry(raw, is_active);
      return Result<bool>(changed);
    }));
  }
  return {};
}

L2Entry Mender::mended_l2_entry(L2Entry entry, const Table& table, uint64_t index) const {
  if (all_) {
    EntryRules::Known known;
    if (table.guest) known.guest = *table.guest + (index << header_.cluster_bits);
    if (rules_.names_host(entry) && !format_.data_file) known.sole = users_of(entry.host()) == table.times;
    entry = rules_.mended(entry, known);
  }
  if (table.active == 0 || format_.data_file || !rules_.names_host(entry)) return entry;
  const bool counted =
      entry.host().bytes() % header_.cluster_size() == 0 && cluster_of(entry.host()) < survey_.references.end();
  if (counted) entry.raw = copied_wanted(entry.host()) ? entry.raw | kCopied : entry.raw & ~kCopied;
  return entry;
}

Result<> Mender::mend_l2_tables() {
  for (auto c = survey_.l2_tables.next(0); c; c = survey_.l2_tables.next(*c + 1)) {
    const Table table{survey_.l2_tables.get(*c), survey_.active_tables.get(*c), survey_.mapped_by(header_, *c)};
    const HostRange range{HostOffset(*c << header_.cluster_bits), header_.cluster_size()};
    if (overlaps(range)) continue;
    IMG_TRY(edit_table(storage_, range, [&](uint64_t word, Entries words) {
      const Bytes bytes = std::as_writable_bytes(words);
      const uint64_t first = word * 8 / format_.entry_bytes();
      bool changed = false;
      for (uint64_t i = 0; i < bytes.size() / format_.entry_bytes(); ++i) {
        const L2Entry entry = format_.load(bytes, i);
        if (entry == L2Entry{}) continue;
        const L2Entry mended = mended_l2_entry(entry, table, first + i);
        if (mended == entry) continue;
        format_.store(bytes, i, mended);
        changed = true;
      }
      return Result<bool>(changed);
    }));
  }
  return {};
}

}  // namespace

Result<> mend(Storage& storage, const Header& header, Repair mode, Examination& found) {
  Mender mender(storage, header, mode, found);
  if (mender.has_bad_bitmaps()) IMG_TRY(mender.drop(kBitmaps));
  if (found.survey->mendable_entries == 0 && !mender.has_wrong_flags()) return {};
  IMG_TRY(mender.mend_l1_tables());
  IMG_TRY(mender.mend_l2_tables());
  return storage.flush();
}

}  // namespace imgfuse::qcow2
