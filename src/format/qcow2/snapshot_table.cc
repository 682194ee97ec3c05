#include "format/qcow2/snapshot_table.h"

#include <algorithm>
#include <span>

#include "base/math.h"
#include "format/qcow2/byte_reader.h"
#include "format/qcow2/layout.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint64_t kNoIcount = ~uint64_t{0};
constexpr size_t kWantedExtra = 16;  // the two sizes

/// Of the extra data the format knows the first 24 bytes.
void read_extra(const Header& header, Snapshot& snapshot) {
  const size_t size = snapshot.extra.size();
  wire::SnapshotExtra extra;
  std::ranges::copy(std::span(snapshot.extra).first(std::min(size, sizeof extra)),
                    std::as_writable_bytes(std::span(&extra, 1)).begin());
  snapshot.info.disk_size = header.size;
  if (size >= offsetof(wire::SnapshotExtra, disk_size)) snapshot.info.vm_state_size = extra.vm_state_size;
  if (size >= offsetof(wire::SnapshotExtra, icount)) snapshot.info.disk_size = extra.disk_size;
  if (size >= sizeof extra && extra.icount != kNoIcount) snapshot.info.icount = extra.icount;
}

/// The extra data as stored, completed where it is too short.
std::vector<std::byte> extra_to_write(const Snapshot& snapshot) {
  if (!snapshot.lacks_extra_data()) return snapshot.extra;
  wire::SnapshotExtra extra;
  extra.vm_state_size = snapshot.info.vm_state_size;
  extra.disk_size = snapshot.info.disk_size;
  const auto bytes = std::as_bytes(std::span(&extra, 1)).first(kWantedExtra);
  return {bytes.begin(), bytes.end()};
}

void append(std::vector<std::byte>& out, ConstBytes bytes) { out.insert(out.end(), bytes.begin(), bytes.end()); }

}  // namespace

Result<SnapshotTable> read_snapshot_table(Storage& storage, const Header& header) {
  SnapshotTable table;
  if (header.snapshot_count == 0) return table;
  if (header.snapshots_offset == HostOffset(0))
    return fail(ErrorCode::corrupt, "snapshot table offset 0 (header byte 64) is the header's own place");
  IMG_LET(const uint64_t file_size, storage.size());
  if (header.snapshots_offset.bytes() >= file_size)
    return fail(ErrorCode::corrupt, "snapshot table at {:#x} (header byte 64) lies past the end of the file ({:#x})",
                header.snapshots_offset.bytes(), file_size);

  ByteReader reader(storage, header.snapshots_offset);
  for (uint32_t index = 0; index < header.snapshot_count; ++index) {
    IMG_LET(const auto raw, reader.read<wire::SnapshotHeader>());
    const uint32_t extra_size = raw.extra_size;
    if (extra_size > kMaxSnapshotExtra)
      return fail(ErrorCode::corrupt, "snapshot {} has {} bytes of extra data, more than {}", index, extra_size,
                  kMaxSnapshotExtra);
    const uint64_t length = sizeof raw + uint64_t{extra_size} + raw.id_length + raw.name_length;
    table.length += round_up(length, 8);
    if (table.length > kMaxSnapshotTableBytes)
      return fail(ErrorCode::corrupt, "the snapshot table is longer than 64 MiB at snapshot {} of {}", index,
                  header.snapshot_count);

    Snapshot snapshot;
    snapshot.l1_offset = HostOffset(raw.l1_offset);
    snapshot.l1_entries = raw.l1_entries;
    snapshot.info.date_sec = raw.date_sec;
    snapshot.info.date_nsec = raw.date_nsec;
    snapshot.info.vm_clock_nsec = raw.vm_clock_nsec;
    snapshot.info.vm_state_size = raw.vm_state_size;
    snapshot.extra.resize(extra_size);
    IMG_TRY(reader.read(snapshot.extra));
    read_extra(header, snapshot);
    IMG_LET(snapshot.info.id, reader.read_text(raw.id_length));
    IMG_LET(snapshot.info.name, reader.read_text(raw.name_length));
    reader.skip(round_up(length, 8) - length);
    table.snapshots.push_back(std::move(snapshot));
  }
  return table;
}

Result<size_t> find_snapshot(const std::vector<Snapshot>& snapshots, const std::string& id_or_name) {
  std::vector<size_t> found;
  const auto collect = [&](std::string SnapshotInfo::*field) {
    for (size_t i = 0; i < snapshots.size(); ++i)
      if (snapshots[i].info.*field == id_or_name) found.push_back(i);
  };
  collect(&SnapshotInfo::id);
  if (found.empty()) collect(&SnapshotInfo::name);
  if (found.empty()) return fail(ErrorCode::not_found, "no snapshot has the id or the name {:?}", id_or_name);
  if (found.size() == 1) return found.front();
  std::string ids;
  for (const size_t i : found) ids += (ids.empty() ? "" : ", ") + snapshots[i].info.id;
  return fail(ErrorCode::invalid, "{} snapshots are named {:?}; give the id of one of them: {}", found.size(),
              id_or_name, ids);
}

std::vector<std::byte> encode_snapshot_extra(const SnapshotInfo& info) {
  wire::SnapshotExtra extra;
  extra.vm_state_size = info.vm_state_size;
  extra.disk_size = info.disk_size;
  extra.icount = info.icount.value_or(kNoIcount);
  const auto bytes = std::as_bytes(std::span(&extra, 1));
  return {bytes.begin(), bytes.end()};
}

std::vector<std::byte> encode_snapshot_table(const SnapshotTable& table) {
  std::vector<std::byte> out;
  for (const Snapshot& snapshot : table.snapshots) {
    const std::vector<std::byte> extra = extra_to_write(snapshot);
    wire::SnapshotHeader raw;
    raw.l1_offset = snapshot.l1_offset.bytes();
    raw.l1_entries = snapshot.l1_entries;
    raw.id_length = static_cast<uint16_t>(snapshot.info.id.size());
    raw.name_length = static_cast<uint16_t>(snapshot.info.name.size());
    raw.date_sec = snapshot.info.date_sec;
    raw.date_nsec = snapshot.info.date_nsec;
    raw.vm_clock_nsec = snapshot.info.vm_clock_nsec;
    // The short field holds what fits; the one in the extra data has the last word.
    raw.vm_state_size = snapshot.info.vm_state_size >> 32 ? 0 : static_cast<uint32_t>(snapshot.info.vm_state_size);
    raw.extra_size = static_cast<uint32_t>(extra.size());
    append(out, std::as_bytes(std::span(&raw, 1)));
    append(out, extra);
    append(out, std::as_bytes(std::span(snapshot.info.id)));
    append(out, std::as_bytes(std::span(snapshot.info.name)));
    out.resize(round_up(out.size(), 8));
  }
  return out;
}

Result<> check_snapshot_l1(const Header& header, const Snapshot& snapshot) {
  if (snapshot.l1_offset.bytes() % header.cluster_size() != 0)
    return fail(ErrorCode::corrupt, "snapshot {} ({}): L1 table offset {:#x} is not a multiple of the cluster size {}",
                snapshot.info.id, snapshot.info.name, snapshot.l1_offset.bytes(), header.cluster_size());
  if (snapshot.l1_entries > kMaxL1Entries)
    return fail(ErrorCode::corrupt, "snapshot {} ({}): L1 table of {} entries is larger than 32 MiB", snapshot.info.id,
                snapshot.info.name, snapshot.l1_entries);
  if (snapshot.l1_offset.bytes() >> 63)
    return fail(ErrorCode::corrupt, "snapshot {} ({}): L1 table offset {:#x} is not below 2^63", snapshot.info.id,
                snapshot.info.name, snapshot.l1_offset.bytes());
  return {};
}

}  // namespace imgfuse::qcow2
