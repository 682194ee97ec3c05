// Checking: a survey of all references, compared with the stored reference counts; then repair and a second look.
#include <algorithm>
#include <memory>
#include <span>
#include <tuple>

#include "base/endian.h"
#include "format/qcow2/examination.h"
#include "format/qcow2/header_update.h"
#include "format/qcow2/qcow2.h"
#include "format/qcow2/refcounts.h"
#include "format/qcow2/repair.h"
#include "format/qcow2/table_scan.h"

namespace imgfuse::qcow2 {
namespace {

constexpr int kRepairRounds = 4;

/// Compares the counted references with the stored ones, block by block.
class Comparison {
 public:
  Comparison(Storage& storage, const Header& header, Findings& findings, Examination& examination)
      : storage_(storage),
        header_(header),
        findings_(findings),
        examination_(examination),
        survey_(*examination.survey),
        bits_(1u << header.refcount_order),
        counted_end_(std::max(survey_.file_clusters, survey_.references.end())),
        end_(std::max({counted_end_, survey_.copied.end(), survey_.not_copied.end()})) {}

  Result<> run() {
    const uint64_t per_block = header_.refcounts_per_block();
    for (uint64_t first = 0; first < end_; first += per_block)
      IMG_TRY(
          compare_block(survey_.refcount_block(header_, first / per_block), first, std::min(first + per_block, end_)));
    findings_.report().image_end_offset = used_end_ << header_.cluster_bits;
    return {};
  }

 private:
  /// Clusters [first, last), counted by the block at `block` if that is not 0.
  Result<> compare_block(HostOffset block, uint64_t first, uint64_t last) {
    if (block == HostOffset(0)) {
      const uint64_t corruptions = findings_.report().corruptions;
      compare_uncounted(first, last);
      if (findings_.report().corruptions != corruptions) survey_.must_rebuild = true;
      return {};
    }
    uint64_t next = first;
    IMG_TRY(scan_table(storage_, {block, header_.cluster_size()}, [&](uint64_t word, Entries words) {
      const uint64_t begin = std::min(first + word * 64 / bits_, last);
      compare_uncounted(next, begin);
      next = std::min(begin + words.size() * 64 / bits_, last);
      const ConstBytes bytes = std::as_bytes(words);
      for (uint64_t cluster = begin; cluster < next; ++cluster)
        compare_cluster(cluster, get_refcount(bytes, cluster - begin, bits_));
      return Result<>{};
    }));
    compare_uncounted(next, last);
    return {};
  }

  /// Clusters whose stored counts are all zero.
  void compare_uncounted(uint64_t first, uint64_t last) {
    const ReferenceCounts& references = survey_.references;
    for (auto c = references.next(first); c && *c < last; c = references.next(*c + 1)) compare_cluster(*c, 0);
    const ReferenceCounts& copied = survey_.copied;
    for (auto c = copied.next(std::max(first, references.end())); c && *c < last; c = copied.next(*c + 1))
      compare_cluster(*c, 0);
  }

  void compare_cluster(uint64_t cluster, uint64_t stored) {
    if (cluster < counted_end_) compare_counts(cluster, stored, survey_.references.get(cluster));
    // The flag promises that a cluster may be overwritten. Only entries in the active tables keep the promise.
    const uint64_t wrong_flags = stored == 1 ? survey_.not_copied.get(cluster) : survey_.copied.get(cluster);
    if (wrong_flags == 0) return;
    examination_.wrong_flags += wrong_flags;
    findings_.corruption(wrong_flags, "cluster {}: refcount {}, but {} entries point at it {} the COPIED flag", cluster,
                         stored, wrong_flags, stored == 1 ? "without" : "with");
  }

  void compare_counts(uint64_t cluster, uint64_t stored, uint64_t counted) {
    if (stored == 0 && counted == 0) return;
    used_end_ = std::max(used_end_, cluster + 1);
    if (stored > counted) {
      findings_.leak("leaked cluster {}: refcount {}, references {}", cluster, stored, counted);
    } else if (stored < counted) {
      findings_.corruption(1, "cluster {}: refcount {}, references {}", cluster, stored, counted);
    } else if (counted > 1 && survey_.metadata_overlaps(cluster)) {
      findings_.corruption(1, "cluster {} holds metadata, but has {} references", cluster, counted);
    }
  }

  Storage& storage_;
  const Header& header_;
  Findings& findings_;
  Examination& examination_;
  Survey& survey_;
  const uint32_t bits_;
  const uint64_t counted_end_;  // counts behind the end of the file mean nothing,
  const uint64_t end_;          // unless an entry still points there
  uint64_t used_end_ = 0;
};

Result<Examination> examine(Storage& storage, const Header& header, const CheckSink& sink) {
  Examination examination;
  Findings findings(examination.report, sink);
  IMG_LET(examination.snapshots, read_snapshot_table(storage, header));
  for (const Snapshot& snapshot : examination.snapshots.snapshots) {
    if (header.version == 2 || !snapshot.lacks_extra_data()) continue;
    findings.corruption(1, "snapshot {} has {} bytes of extra data, version 3 wants 16", snapshot.info.id,
                        snapshot.extra.size());
    examination.incomplete_snapshots = true;
  }
  IMG_TRY(
      take_survey(storage, header, examination.snapshots, RefcountStructures::counted, findings, *examination.survey));
  IMG_TRY(Comparison(storage, header, findings, examination).run());
  return examination;
}

/// An image without corruptions is neither dirty nor corrupt, whatever its header says, and what was counted ahead has
/// been given back.
Result<> clear_marks(Storage& storage, Header header) {
  if (header.counts_ahead) {
    header.counts_ahead = false;
    IMG_TRY(replace_header(storage, header));
  }
  if ((header.incompatible & (kDirty | kCorrupt)) == 0) return {};
  IMG_TRY(storage.flush());
  const be<uint64_t> incompatible = header.incompatible & ~(kDirty | kCorrupt);
  IMG_TRY(storage.write(kIncompatibleField, std::as_bytes(std::span(&incompatible, 1))));
  return storage.flush();
}

/// What is wrong, the worst first.
auto severity(const CheckReport& report) { return std::tuple(report.check_errors, report.corruptions, report.leaks); }

enum class TableEntries { mended, kept };

Result<CheckReport> check_and_repair(Storage& storage, Repair mode, TableEntries entries, const CheckSink& sink) {
  IMG_LET(Header header, read_header(storage, Purpose::repair));
  IMG_LET(Examination found, examine(storage, header, sink));
  if (mode == Repair::none) return found.report;
  const CheckReport first = found.report;
  const CheckSink left = [&](const std::string& finding) {
    if (sink) sink("left: " + finding);
  };
  // What one round puts right may uncover something for a second one, such as a leak where a bad entry pointed.
  auto before = severity(first);
  for (int round = 0; round < kRepairRounds && !found.report.clean(); ++round) {
    if (round > 0 && severity(found.report) >= before) break;  // the last round changed nothing
    before = severity(found.report);
    found.keep_entries = entries == TableEntries::kept;
    IMG_TRY(repair(storage, header, mode, found));
    found = {};  // before the next one takes its memory
    IMG_LET(header, read_header(storage, Purpose::repair));
    IMG_LET(found, examine(storage, header, left));
  }
  CheckReport& report = found.report;
  report.corruptions_fixed = first.corruptions - std::min(first.corruptions, report.corruptions);
  report.leaks_fixed = first.leaks - std::min(first.leaks, report.leaks);
  if (report.corruptions == 0 && report.check_errors == 0) IMG_TRY(clear_marks(storage, header));
  return report;
}

/// Nothing is used behind that; it is gone durably, so that nothing can be written there before.
Result<> cut_behind(Storage& storage, uint64_t end) {
  IMG_LET(const uint64_t size, storage.size());
  if (!storage.info().extensible || size <= end) return {};
  IMG_TRY(storage.resize(end));
  return storage.flush();
}

}  // namespace

Result<CheckReport> check(Storage& storage, Repair mode, const CheckSink& sink) {
  return check_and_repair(storage, mode, TableEntries::mended, sink);
}

Result<> recount(Storage& storage) {
  IMG_LET(const CheckReport report, check_and_repair(storage, Repair::all, TableEntries::kept, {}));
  if (report.corruptions == 0 && report.check_errors == 0) return {};
  return fail(ErrorCode::corrupt,
              "the image was not closed cleanly and {} damaged entries could not be repaired; it can be opened "
              "read-only",
              report.corruptions + report.check_errors);
}

Result<> free_counted_ahead(Storage& storage) {
  IMG_LET(const CheckReport report, check_and_repair(storage, Repair::leaks, TableEntries::kept, {}));
  if (report.corruptions == 0 && report.check_errors == 0) return cut_behind(storage, report.image_end_offset);
  return fail(ErrorCode::corrupt, "{} damaged entries were found", report.corruptions + report.check_errors);
}

}  // namespace imgfuse::qcow2
