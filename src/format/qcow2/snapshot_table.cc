#include "format/qcow2/snapshot_table.h"

#include <algorithm>
#include <cstring>
#include <span>

#include "base/buffer.h"
#include "base/math.h"
#include "format/qcow2/layout.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint64_t kNoIcount = ~uint64_t{0};

/// Reads a storage front to back in large pieces.
class Reader {
 public:
  Reader(Storage& storage, HostOffset begin) : storage_(storage), next_(begin) {}

  Result<> read(Bytes out) {
    while (!out.empty()) {
      if (rest_.empty()) IMG_TRY(fill());
      const size_t n = std::min(out.size(), rest_.size());
      std::memcpy(out.data(), rest_.data(), n);
      out = out.subspan(n);
      rest_ = rest_.subspan(n);
    }
    return {};
  }

 private:
  Result<> fill() {
    IMG_TRY(storage_.read(next_, piece_.bytes()));
    next_ = next_ + piece_.size();
    rest_ = piece_.bytes();
    return {};
  }

  Storage& storage_;
  HostOffset next_;
  Buffer piece_{size_t{64} << 10};
  ConstBytes rest_;
};

Result<std::string> read_text(Reader& reader, size_t length) {
  std::string text(length, '\0');
  IMG_TRY(reader.read(std::as_writable_bytes(std::span(text))));
  return text;
}

/// Reads the extra data, of which the format knows the first 24 bytes.
Result<> read_extra(Reader& reader, const Header& header, uint32_t size, SnapshotInfo& info) {
  std::byte bytes[kMaxSnapshotExtra];
  IMG_TRY(reader.read(Bytes(bytes, size)));
  wire::SnapshotExtra extra;
  std::memcpy(&extra, bytes, std::min<size_t>(size, sizeof extra));
  info.disk_size = header.size;
  if (size >= offsetof(wire::SnapshotExtra, disk_size)) info.vm_state_size = extra.vm_state_size;
  if (size >= offsetof(wire::SnapshotExtra, icount)) info.disk_size = extra.disk_size;
  if (size >= sizeof extra && extra.icount != kNoIcount) info.icount = extra.icount;
  return {};
}

}  // namespace

Result<SnapshotTable> read_snapshot_table(Storage& storage, const Header& header) {
  SnapshotTable table;
  if (header.snapshot_count == 0) return table;
  if (header.snapshots_offset == HostOffset(0))
    return fail(ErrorCode::corrupt, "snapshot table offset 0 (header byte 64) is the header's own place");

  Reader reader(storage, header.snapshots_offset);
  for (uint32_t index = 0; index < header.snapshot_count; ++index) {
    wire::SnapshotHeader raw;
    IMG_TRY(reader.read(std::as_writable_bytes(std::span(&raw, 1))));
    Snapshot snapshot;
    snapshot.l1_offset = HostOffset(raw.l1_offset);
    snapshot.l1_entries = raw.l1_entries;
    snapshot.extra_size = raw.extra_size;
    snapshot.info.date_sec = raw.date_sec;
    snapshot.info.date_nsec = raw.date_nsec;
    snapshot.info.vm_clock_nsec = raw.vm_clock_nsec;
    snapshot.info.vm_state_size = raw.vm_state_size;
    if (snapshot.extra_size > kMaxSnapshotExtra)
      return fail(ErrorCode::corrupt, "snapshot {} has {} bytes of extra data, more than {}", index,
                  snapshot.extra_size, kMaxSnapshotExtra);
    IMG_TRY(read_extra(reader, header, snapshot.extra_size, snapshot.info));
    IMG_LET(snapshot.info.id, read_text(reader, raw.id_length));
    IMG_LET(snapshot.info.name, read_text(reader, raw.name_length));

    const uint64_t length = sizeof raw + uint64_t{snapshot.extra_size} + raw.id_length + raw.name_length;
    const uint64_t padded = round_up(length, 8);
    std::byte padding[8];
    IMG_TRY(reader.read(Bytes(padding, padded - length)));
    table.length += padded;
    if (table.length > kMaxSnapshotTableBytes)
      return fail(ErrorCode::corrupt, "the snapshot table is longer than 64 MiB at snapshot {} of {}", index,
                  header.snapshot_count);
    table.snapshots.push_back(std::move(snapshot));
  }
  return table;
}

}  // namespace imgfuse::qcow2
