#include "format/qcow2/repair.h"

#include <algorithm>

#include "base/math.h"
#include "format/qcow2/mend.h"
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

 private:
  Survey& survey() { return *found_.survey; }
  template <class F>
  Result<> edit_blocks(F f);

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
    const uint64_t known = std::min(stored, ReferenceCounts::kMaxCount);
    if (known > counted) {
      survey().references.add(cluster, known - counted);
      survey().unexplained.add(cluster, known - counted);
    }
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

}  // namespace

Result<> repair(Storage& storage, const Header& header, Repair mode, Examination& found) {
  Repairer repairer(storage, header, found);
  const bool must_rebuild = found.survey->must_rebuild || found.incomplete_snapshots;
  if (mode == Repair::all && must_rebuild) {
    IMG_TRY(repairer.rebuild());
    return mend(storage, header, mode, found);
  }
  if (found.survey->must_rebuild)
    return fail(ErrorCode::corrupt,
                "the refcount structures are damaged, so leaks cannot be told from data; "
                "`imgfuse check --repair all` builds new ones");
  if (found.survey->lost_references) IMG_TRY(repairer.keep_unexplained_counts());
  if (mode == Repair::all) IMG_TRY(repairer.adjust_counts(Repairer::Direction::up));
  // With leaks only, the flags are right again once counts are, provided that nothing else is wrong.
  if (mode == Repair::all || found.report.corruptions == found.wrong_flags) IMG_TRY(mend(storage, header, mode, found));
  return repairer.adjust_counts(Repairer::Direction::down);
}

}  // namespace imgfuse::qcow2
