#include "format/qcow2/repair.h"

#include <algorithm>

#include "base/math.h"
#include "format/qcow2/l2_entry.h"
#include "format/qcow2/rebuild.h"
#include "format/qcow2/refcounts.h"
#include "format/qcow2/table_scan.h"

namespace imgfuse::qcow2 {
namespace {

class Repairer {
 public:
  Repairer(Storage& storage, const Header& header, Examination& found)
      : storage_(storage), header_(header), found_(found), bits_(1u << header.refcount_order) {}

  Result<> rebuild();
  Result<> keep_unexplained_counts();
  enum class Direction { up, down };
  Result<> adjust_counts(Direction direction);
  Result<> mend_entries(Repair mode);

 private:
  Survey& survey() { return *found_.survey; }
  template <class F>
  Result<> edit_blocks(F f);
  bool has_wrong_flags();
  bool copied_wanted(HostOffset host) { return survey().references.get(host.bytes() >> header_.cluster_bits) == 1; }
  bool mend_l1_entry(be<uint64_t>& raw);
  bool mend_l2_entry(be<uint64_t>& raw, bool active, Repair mode);
  Result<> mend_l1();
  bool overlaps(HostRange range);

  Storage& storage_;
  const Header& header_;
  Examination& found_;
  const uint32_t bits_;
};

/// Builds the refcount structures anew, and the snapshot table with them where that is incomplete. Afterwards the
/// survey describes the image with its new structures.
Result<> Repairer::rebuild() {
  uint64_t first_free = survey().references.end();
  if (storage_.info().extensible) first_free = std::max(first_free, survey().file_clusters);
  found_.survey = nullptr;  // gives its memory to the next one
  found_.survey = std::make_unique<Survey>();
  if (found_.incomplete_snapshots) found_.snapshots.length = 0;  // the new one is counted with the new structures
  CheckReport unused;
  const CheckSink no_sink;
  Findings silent(unused, no_sink);
  IMG_TRY(take_survey(storage_, header_, found_.snapshots, RefcountStructures::ignored, silent, survey()));
  return rebuild_refcounts(storage_, header_,
                           {.references = survey().references,
                            .first_free = first_free,
                            .new_snapshots = found_.incomplete_snapshots ? &found_.snapshots : nullptr});
}

/// Shows the stored counts to `f(cluster, count)`, which may change them.
template <class F>
Result<> Repairer::edit_blocks(F f) {
  const uint64_t per_block = header_.refcounts_per_block();
  const uint64_t end = std::max(survey().file_clusters, survey().references.end());
  for (uint64_t first = 0; first < end; first += per_block) {
    const HostOffset block = survey().refcount_block(header_, first / per_block);
    if (block == HostOffset(0)) continue;
    const uint64_t last = std::min(first + per_block, end);
    // Holes in a block are zero counts, which may have to be raised: they are read like the rest.
    IMG_TRY(edit_whole_table(storage_, {block, header_.cluster_size()}, [&](uint64_t word, Entries words) {
      const Bytes bytes = std::as_writable_bytes(words);
      bool changed = false;
      const uint64_t begin = first + word * 64 / bits_;
      const uint64_t stop = std::min(begin + words.size() * 64 / bits_, last);
      for (uint64_t cluster = begin; cluster < stop; ++cluster) {
        const uint64_t stored = get_refcount(bytes, cluster - begin, bits_);
        const uint64_t wanted = f(cluster, stored);
        if (wanted == stored) continue;
        set_refcount(bytes, cluster - begin, bits_, wanted);
        changed = true;
      }
      return Result<bool>(changed);
    }));
  }
  return {};
}

/// References that could not be followed are somewhere among the leaks, so no leak may be freed: the larger stored
/// counts become the truth.
Result<> Repairer::keep_unexplained_counts() {
  IMG_TRY(edit_blocks([&](uint64_t cluster, uint64_t stored) {
    const uint64_t counted = survey().references.get(cluster);
    if (stored > counted) survey().references.add(cluster, stored - counted);
    return stored;
  }));
  return survey().check_budget();
}

Result<> Repairer::adjust_counts(Direction direction) {
  IMG_TRY(edit_blocks([&](uint64_t cluster, uint64_t stored) {
    const uint64_t wanted = std::min(survey().references.get(cluster), header_.max_refcount());
    return direction == Direction::up ? std::max(stored, wanted) : std::min(stored, wanted);
  }));
  return storage_.flush();
}

/// Against the counts as they will be, not as they were found.
bool Repairer::has_wrong_flags() {
  const Survey& s = survey();
  for (auto c = s.copied.next(0); c; c = s.copied.next(*c + 1))
    if (s.references.get(*c) != 1) return true;
  for (auto c = s.not_copied.next(0); c; c = s.not_copied.next(*c + 1))
    if (s.references.get(*c) == 1) return true;
  return false;
}

/// Something else lies in the range, so that nothing may be written there.
bool Repairer::overlaps(HostRange range) {
  const uint64_t last = (range.end().bytes() - 1) >> header_.cluster_bits;
  for (uint64_t c = range.begin.bytes() >> header_.cluster_bits; c <= last; ++c)
    if (survey().metadata_overlaps(c)) return true;
  return false;
}

bool Repairer::mend_l1_entry(be<uint64_t>& raw) {
  const L1Entry entry{raw};
  const uint64_t cluster = entry.table().bytes() >> header_.cluster_bits;
  if (!entry.present() || survey().active_tables.get(cluster) == 0) return false;  // none, or not a place for a table
  if (entry.copied() == copied_wanted(entry.table())) return false;
  raw = entry.raw ^ kCopied;
  return true;
}

Result<> Repairer::mend_l1() {
  const HostRange l1{header_.l1_offset, uint64_t{header_.l1_entries} * 8};
  if (l1.empty() || overlaps(l1)) return {};
  return edit_table(storage_, l1, [&](uint64_t, Entries entries) {
    bool changed = false;
    for (be<uint64_t>& raw : entries) changed |= mend_l1_entry(raw);
    return Result<bool>(changed);
  });
}

bool Repairer::mend_l2_entry(be<uint64_t>& raw, bool active, Repair mode) {
  const L2Entry entry{raw};
  const ClusterKind kind = entry.kind();
  uint64_t mended = entry.raw;
  if (kind == ClusterKind::compressed) {
    if (mode == Repair::all) mended &= ~kCopied;
  } else if (kind == ClusterKind::normal || kind == ClusterKind::zero_allocated) {
    const bool aligned = entry.host().bytes() % header_.cluster_size() == 0;
    if (!aligned && kind == ClusterKind::zero_allocated && mode == Repair::all) {
      mended = kZeroFlag;  // its host cluster held nothing of value
    } else if (aligned && active && entry.host().bytes() >> header_.cluster_bits < survey().references.end()) {
      mended = copied_wanted(entry.host()) ? mended | kCopied : mended & ~kCopied;
    }
  }
  if (mended == entry.raw) return false;
  raw = mended;
  return true;
}

/// COPIED flags in the active tables, and the few entries that can be put right by themselves.
Result<> Repairer::mend_entries(Repair mode) {
  if (!has_wrong_flags() && survey().mendable_entries == 0) return {};
  IMG_TRY(mend_l1());
  const Survey& s = survey();
  for (auto c = s.l2_tables.next(0); c; c = s.l2_tables.next(*c + 1)) {
    const bool active = s.active_tables.get(*c) != 0;
    const HostRange table{HostOffset(*c << header_.cluster_bits), header_.cluster_size()};
    if (overlaps(table)) continue;
    IMG_TRY(edit_table(storage_, table, [&](uint64_t, Entries entries) {
      bool changed = false;
      for (be<uint64_t>& raw : entries) changed |= mend_l2_entry(raw, active, mode);
      return Result<bool>(changed);
    }));
  }
  return storage_.flush();
}

}  // namespace

Result<> repair(Storage& storage, const Header& header, Repair mode, Examination& found) {
  Repairer repairer(storage, header, found);
  const bool must_rebuild = found.survey->must_rebuild || found.incomplete_snapshots;
  if (mode == Repair::all && must_rebuild) {
    IMG_TRY(repairer.rebuild());
    return repairer.mend_entries(mode);
  }
  if (found.survey->must_rebuild)
    return fail(ErrorCode::corrupt,
                "the refcount structures are damaged, so leaks cannot be told from data; "
                "`imgfuse check --repair all` builds new ones");
  if (found.survey->lost_references) IMG_TRY(repairer.keep_unexplained_counts());
  if (mode == Repair::all) IMG_TRY(repairer.adjust_counts(Repairer::Direction::up));
  // With leaks only, the flags are right again once counts are, provided that nothing else is wrong.
  if (mode == Repair::all || found.report.corruptions == found.wrong_flags) IMG_TRY(repairer.mend_entries(mode));
  return repairer.adjust_counts(Repairer::Direction::down);
}

}  // namespace imgfuse::qcow2
