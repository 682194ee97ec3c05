#include "format/qcow2/downgrade.h"

#include <algorithm>

#include "base/buffer.h"
#include "format/qcow2/l2_entry.h"
#include "format/qcow2/layout.h"
#include "format/qcow2/snapshot_table.h"
#include "format/qcow2/table_scan.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint64_t kStep = uint64_t{1} << 20;

using EntryVisitor = std::function<Result<bool>(be<uint64_t>& entry)>;

/// Shows the standard entries of all L2 tables of one L1 table; writes back what `visit` says that it changed.
Result<> for_each_l2_entry(Storage& storage, const Header& header, HostRange l1, const EntryVisitor& visit) {
  return scan_table(storage, l1, [&](uint64_t, Entries l1_entries) -> Result<> {
    for (const uint64_t raw : l1_entries) {
      const L1Entry l1_entry{raw};
      if (!l1_entry.present()) continue;
      if (l1_entry.table().bytes() % header.cluster_size() != 0)
        return fail(ErrorCode::corrupt, "an L1 entry points at {:#x}, which is not a cluster",
                    l1_entry.table().bytes());
      IMG_TRY(edit_table(storage, {l1_entry.table(), header.cluster_size()},
                         [&](uint64_t, Entries entries) -> Result<bool> {
                           bool changed = false;
                           for (be<uint64_t>& entry : entries) {
                             if (entry == 0) continue;
                             IMG_LET(const bool this_one, visit(entry));
                             changed |= this_one;
                           }
                           return changed;
                         }));
    }
    return {};
  });
}

HostRange active_l1(const Header& header) { return {header.l1_offset, uint64_t{header.l1_entries} * 8}; }

/// Clusters of a snapshot are shared and cannot be given other contents, so it must have no zero clusters.
Result<> check_snapshot(Storage& storage, const Header& header, const Snapshot& snapshot) {
  IMG_TRY(check_snapshot_l1(header, snapshot));
  if (snapshot.info.disk_size != header.size)
    return fail(ErrorCode::unsupported,
                "snapshot {} has a disk of {} bytes, not {}, which compat 0.10 cannot say; delete it first",
                snapshot.info.id, snapshot.info.disk_size, header.size);
  if (snapshot.info.vm_state_size >> 32)
    return fail(ErrorCode::unsupported,
                "the machine state of snapshot {} is too large for compat 0.10; delete it first", snapshot.info.id);
  return for_each_l2_entry(storage, header, snapshot.l1(), [&](be<uint64_t>& raw) -> Result<bool> {
    const ClusterKind kind = L2Format{}.kind(L2Entry{raw});
    if (kind == ClusterKind::zero_plain || kind == ClusterKind::zero_allocated)
      return fail(ErrorCode::unsupported,
                  "snapshot {} has zero clusters, which compat 0.10 does not have; delete it first", snapshot.info.id);
    return false;
  });
}

/// zstd is a feature of version 3; without a compressed cluster it is only a name.
Result<> check_not_compressed(Storage& storage, const Header& header, HostRange l1) {
  if (header.compression == Compression::deflate) return {};
  return for_each_l2_entry(storage, header, l1, [&](be<uint64_t>& raw) -> Result<bool> {
    if (L2Format{}.kind(L2Entry{raw}) == ClusterKind::compressed)
      return fail(ErrorCode::unsupported,
                  "the image has clusters compressed with zstd, which compat 0.10 does not know");
    return false;
  });
}

/// Gives every zero cluster that is not simply empty a content of zeros.
Result<> fill_zero_clusters(Disk& disk, bool has_backing) {
  for (GuestRange rest{GuestOffset(0), disk.size()}; !rest.empty();) {
    IMG_LET(const std::vector<Extent> extents, disk.map(rest));
    for (const Extent& extent : extents) {
      const bool own_zeros = extent.kind == ExtentKind::zero && extent.depth == 0;
      if (!own_zeros || (!has_backing && !extent.has_host_offset)) continue;
      for (uint64_t done = 0; done < extent.range.length; done += kStep)
        IMG_TRY(disk.write(extent.range.begin + done, zeroes(std::min(kStep, extent.range.length - done))));
    }
    const GuestOffset end = extents.back().range.end();
    rest = {end, rest.end() - end};
  }
  return {};
}

}  // namespace

Result<> check_downgrade(Storage& storage, const Header& header) {
  const auto refuse = [](const char* what) {
    return fail(ErrorCode::unsupported, "{}, which compat 0.10 does not have", what);
  };
  if (header.refcount_order != 4) return refuse("the image has reference counts of a width other than 16 bits");
  if (header.incompatible & kExtendedL2) return refuse("the image has extended L2 entries");
  if (header.has_data_file()) return refuse("the image has an external data file");
  if (header.autoclear & kBitmaps) return refuse("the image has dirty bitmaps (remove them first)");
  if (!header.unknown_tail.empty()) return refuse("the header has fields that imgfuse does not know");
  IMG_LET(const SnapshotTable snapshots, read_snapshot_table(storage, header));
  for (const Snapshot& snapshot : snapshots.snapshots) {
    IMG_TRY(check_snapshot(storage, header, snapshot));
    IMG_TRY(check_not_compressed(storage, header, snapshot.l1()));
  }
  return check_not_compressed(storage, header, active_l1(header));
}

Result<> remove_zero_clusters(const std::shared_ptr<Storage>& storage, const BackingOpener& open_backing) {
  {
    IMG_LET(const Header header, read_header(*storage, Purpose::write));
    IMG_LET(auto disk, open(storage, {.open_backing = open_backing}));
    const Result<> filled = fill_zero_clusters(*disk, header.backing_name.has_value());
    const Result<> closed = disk->close();
    IMG_TRY(filled);
    IMG_TRY(closed);
  }
  // What is left has no host cluster and no backing file below it: an empty entry reads the same.
  IMG_LET(const Header header, read_header(*storage, Purpose::write));
  IMG_TRY(for_each_l2_entry(*storage, header, active_l1(header), [](be<uint64_t>& entry) -> Result<bool> {
    if (L2Format{}.kind(L2Entry{entry}) != ClusterKind::zero_plain) return false;
    entry = 0;
    return true;
  }));
  return storage->flush();
}

void make_version_2(Header& header) {
  header.version = 2;
  header.header_length = wire::kHeaderLengthV2;
  header.incompatible = header.compatible = header.autoclear = 0;
  header.compression = Compression::deflate;
  std::erase_if(header.extensions, [](const Extension& e) { return e.type == wire::kExtensionFeatureNames; });
}

}  // namespace imgfuse::qcow2
