#include "format/qcow2/snapshots.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstring>
#include <limits>
#include <numeric>

#include "base/log.h"
#include "core/borrowed_disk.h"
#include "format/qcow2/layout.h"
#include "format/qcow2/qcow2_disk.h"

namespace imgfuse::qcow2 {
namespace {

constexpr GuestRange kEverything{GuestOffset(0), std::numeric_limits<uint64_t>::max()};
constexpr size_t kMaxName = 255;  // QEMU cuts longer ones off
constexpr uint64_t kSnapshotCache = uint64_t{4} << 20;

Result<> check_name(const std::string& name) {
  if (name.empty()) return fail(ErrorCode::invalid, "a snapshot needs a name");
  if (name.size() > kMaxName)
    return fail(ErrorCode::invalid, "a snapshot name of {} bytes is longer than {}", name.size(), kMaxName);
  return {};
}

/// One more than the largest number among the ids.
std::string next_id(const std::vector<Snapshot>& snapshots) {
  uint64_t largest = 0;
  for (const Snapshot& snapshot : snapshots) {
    uint64_t id = 0;
    const std::string& text = snapshot.info.id;
    if (std::from_chars(text.data(), text.data() + text.size(), id).ec == std::errc()) largest = std::max(largest, id);
  }
  return std::to_string(largest + 1);
}

SnapshotInfo taken_now(std::string id, std::string name, uint64_t size) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(now);
  SnapshotInfo info;
  info.id = std::move(id);
  info.name = std::move(name);
  info.disk_size = size;
  info.date_sec = static_cast<uint32_t>(seconds.count());
  info.date_nsec = static_cast<uint32_t>(std::chrono::nanoseconds(now - seconds).count());
  return info;
}

/// What one id names and another snapshot is called: QEMU's tools delete by name and read by id.
Result<> check_not_ambiguous(const std::vector<Snapshot>& snapshots, size_t found, const std::string& id_or_name) {
  for (const Snapshot& other : snapshots)
    if (&other != &snapshots[found] && other.info.name == id_or_name)
      return fail(ErrorCode::invalid, "{:?} is the id of one snapshot and the name of another, whose id is {}",
                  id_or_name, other.info.id);
  return {};
}

}  // namespace

Result<Header> as_of_snapshot(const Header& header, const Snapshot& snapshot) {
  IMG_TRY(check_snapshot_l1(header, snapshot));
  const uint64_t size = snapshot.info.disk_size;
  if (size % 512 != 0 || size > max_virtual_size(header.cluster_bits, header.l2_format().extended))
    return fail(ErrorCode::corrupt, "snapshot {} ({}): a disk of {} bytes is none of this image", snapshot.info.id,
                snapshot.info.name, size);
  Header then = header;
  then.size = size;
  then.l1_offset = snapshot.l1_offset;
  then.l1_entries = snapshot.l1_entries;
  then.snapshot_count = 0;
  then.snapshots_offset = HostOffset(0);
  return then;
}

void Qcow2Snapshots::load() {
  const Geometry& g = disk_.image_.geometry;
  Result<SnapshotTable> table = read_snapshot_table(*disk_.storage_, disk_.header_);
  {
    Lock lock(mutex_);
    if (table) {
      table_ = *table;
    } else {
      damage_ = table.error();
    }
  }
  if (!table)
    return log_warning("{}: {}; its snapshots cannot be used", disk_.storage_->info().name, table.error().text());
  if (table->snapshots.empty()) return;
  ExclusiveLock lock(disk_.image_.mutex);
  disk_.image_.known.add(g.cluster_of(disk_.header_.snapshots_offset), g.clusters_for(table->length));
}

std::vector<Snapshot> Qcow2Snapshots::snapshots() const {
  Lock lock(mutex_);
  return table_.snapshots;
}

Result<std::vector<SnapshotInfo>> Qcow2Snapshots::list() const {
  Lock lock(mutex_);
  if (damage_) return fail(*damage_);
  std::vector<SnapshotInfo> infos;
  for (const Snapshot& snapshot : table_.snapshots) infos.push_back(snapshot.info);
  return infos;
}

Result<> Qcow2Snapshots::check_changeable() const {
  if (disk_.read_only_) return fail(ErrorCode::read_only, "{} is open read-only", disk_.storage_->info().name);
  IMG_TRY(disk_.latch_.check());
  if (disk_.header_.has_data_file())
    return fail(ErrorCode::unsupported, "an image with an external data file cannot have snapshots");
  Lock lock(mutex_);
  if (damage_) return fail(*damage_);
  return {};
}

// ---- The changes

Result<SnapshotInfo> Qcow2Snapshots::create(const std::string& name) {
  IMG_TRY(check_name(name));
  const auto lease = disk_.ranges_.exclusive(kEverything);
  IMG_TRY(check_changeable());
  Outcome outcome{.snapshots = snapshots(), .size = disk_.do_size()};
  if (outcome.snapshots.size() >= kMaxSnapshots)
    return fail(ErrorCode::unsupported, "the image has {} snapshots, and there cannot be more",
                outcome.snapshots.size());

  // The L1 table that was the active one so far becomes the snapshot's, where it lies.
  const L1Table active = disk_.map_.l1_table();
  const HostRange place = disk_.map_.l1_place();
  Snapshot snapshot;
  snapshot.l1_offset = place.begin;
  snapshot.l1_entries = static_cast<uint32_t>(active.size());
  snapshot.info = taken_now(next_id(outcome.snapshots), name, outcome.size);
  snapshot.extra = encode_snapshot_extra(snapshot.info);
  outcome.snapshots.push_back(snapshot);

  L1Table next = active;
  next.resize(std::max<size_t>(1, next.size()));
  IMG_TRY(perform({.gains = {{&next, 1}}, .next = &next}, std::move(outcome)));
  return snapshot.info;
}

Result<> Qcow2Snapshots::apply(const std::string& id_or_name) {
  const auto lease = disk_.ranges_.exclusive(kEverything);
  IMG_TRY(check_changeable());
  const Geometry& g = disk_.image_.geometry;
  const HostRange old_l1 = disk_.map_.l1_place();
  Outcome outcome{.snapshots = snapshots(), .freed = {old_l1}, .new_content = true, .frees_data = true};
  IMG_LET(const size_t found, find_snapshot(outcome.snapshots, id_or_name));
  const Snapshot& snapshot = outcome.snapshots[found];
  IMG_LET(const Header then, as_of_snapshot(disk_.header_, snapshot));
  outcome.size = then.size;
  if (g.version < 3 && outcome.size != disk_.do_size())
    return fail(ErrorCode::unsupported,
                "snapshot {} has a disk of {} bytes, and a version 2 image with snapshots keeps its size of {}",
                snapshot.info.id, outcome.size, disk_.do_size());

  const L1Table active = disk_.map_.l1_table();
  IMG_LET(L1Table next, read_l1(snapshot));
  // Behind the disk's end lies the state of a virtual machine; the active disk does without.
  const uint64_t needed = divide_up(outcome.size, g.l2_coverage);
  next.resize(needed);
  next.resize(
      std::max<uint64_t>({needed, active.size(), 1}));  // lookups without a lease rely on an L1 that never shrinks
  return perform({.gains = {{&active, -1}, {&next, 1}}, .next = &next}, std::move(outcome));
}

Result<> Qcow2Snapshots::remove(const std::string& id_or_name) {
  const auto lease = disk_.ranges_.exclusive(kEverything);
  IMG_TRY(check_changeable());
  Outcome outcome{.snapshots = snapshots(), .size = disk_.do_size(), .frees_data = true};
  IMG_LET(const size_t found, find_snapshot(outcome.snapshots, id_or_name));
  IMG_TRY(check_not_ambiguous(outcome.snapshots, found, id_or_name));
  const Snapshot snapshot = outcome.snapshots[found];
  IMG_TRY(check_snapshot_l1(disk_.header_, snapshot));
  {
    Lock lock(mutex_);
    if (const auto open = open_.find(snapshot.l1_offset.bytes()); open != open_.end() && !open->second.expired())
      return fail(ErrorCode::busy, "snapshot {} ({}) is open", snapshot.info.id, snapshot.info.name);
  }
  outcome.snapshots.erase(outcome.snapshots.begin() + static_cast<ptrdiff_t>(found));
  outcome.freed = {disk_.map_.l1_place(), snapshot.l1()};

  IMG_LET(const L1Table tree, read_l1(snapshot));
  L1Table next = disk_.map_.l1_table();
  next.resize(std::max<size_t>(1, next.size()));
  return perform({.gains = {{&tree, -1}}, .next = &next, .flags = TreeChange::Flags::recount}, std::move(outcome));
}

Result<L1Table> Qcow2Snapshots::read_l1(const Snapshot& snapshot) const {
  IMG_LET(const uint64_t file_size, disk_.storage_->size());
  if (snapshot.l1().end().bytes() > round_up(file_size, disk_.image_.geometry.cluster_size))
    return fail(ErrorCode::corrupt, "snapshot {} ({}): its L1 table at {:#x} lies past the end of the file ({:#x})",
                snapshot.info.id, snapshot.info.name, snapshot.l1_offset.bytes(), file_size);
  std::vector<be<uint64_t>> stored(snapshot.l1_entries);
  if (!stored.empty()) IMG_TRY(disk_.storage_->read(snapshot.l1_offset, std::as_writable_bytes(std::span(stored))));
  return L1Table(stored.begin(), stored.end());
}

Result<> Qcow2Snapshots::perform(TreeChange::Plan plan, Outcome outcome) {
  const std::vector<std::byte> table = encode_snapshot_table({outcome.snapshots, 0});
  if (table.size() > kMaxSnapshotTableBytes)
    return fail(ErrorCode::unsupported, "the snapshot table would grow past {} bytes", kMaxSnapshotTableBytes);
  plan.snapshot_table_bytes = table.size();
  const Qcow2Disk::Strict strict(disk_);
  IMG_TRY(disk_.write_out());
  TreeChange change(disk_.image_, disk_.refcounts_, disk_.allocator_, std::move(plan));
  IMG_TRY(change.examine());
  IMG_TRY(prepare(change, table));
  if (Result<> switched = switch_header(change, outcome); !switched) {
    disk_.latch_.set(switched.error());  // either header may be the durable one
    change.commit();
    return switched;
  }
  if (outcome.frees_data) (void)change.punch();  // advisory: the clusters are free in any case
  adopt(change, std::move(outcome), table.size());
  return {};
}

/// Everything that the header is to point at is durable when it returns.
Result<> Qcow2Snapshots::prepare(TreeChange& change, const std::vector<std::byte>& table) {
  IMG_TRY(change.reserve());
  IMG_TRY(disk_.write_out());  // so that the counts on disk have what was reserved, and none is being lowered
  IMG_TRY(change.write());
  if (!table.empty()) {
    std::vector<std::byte> whole = table;
    whole.resize(round_up(table.size(), disk_.image_.geometry.cluster_size));
    IMG_TRY(disk_.storage_->write(change.snapshot_table_offset(), whole));
  }
  Result<> durable = disk_.storage_->flush();
  if (!durable) disk_.latch_.set(durable.error());
  return durable;
}

/// Size, L1 table, refcount table and snapshot table are neighbours in the header's first sector.
Result<> Qcow2Snapshots::switch_header(const TreeChange& change, const Outcome& outcome) {
  wire::Header raw;
  const Bytes bytes = std::as_writable_bytes(std::span(&raw, 1)).first(wire::kHeaderLengthV2);
  IMG_TRY(disk_.storage_->read(HostOffset(0), bytes));
  raw.size = outcome.size;
  raw.l1_entries = static_cast<uint32_t>(change.l1().size());
  raw.l1_offset = change.l1_offset().bytes();
  raw.refcount_table_offset = change.refcount_table_offset().bytes();
  raw.refcount_table_clusters = static_cast<uint32_t>(change.refcount_table_clusters());
  raw.snapshot_count = static_cast<uint32_t>(outcome.snapshots.size());
  raw.snapshots_offset = change.snapshot_table_offset().bytes();
  IMG_TRY(disk_.image_.header_writer.write(kSizeField, bytes.subspan(kSizeField.bytes())));
  return disk_.storage_->flush();
}

void Qcow2Snapshots::adopt(TreeChange& change, Outcome outcome, uint64_t table_bytes) {
  const Geometry& g = disk_.image_.geometry;
  HostRange old_table{disk_.header_.snapshots_offset, 0};
  {
    Lock own(mutex_);
    old_table.length = table_.length;
  }
  {
    ExclusiveLock lock(disk_.image_.mutex);
    KnownMetadata& known = disk_.image_.known;
    disk_.map_.replace_l1(change.l1_offset(), change.l1());
    if (outcome.new_content) disk_.map_.set_allocated(change.allocated_clusters() * g.cluster_size);
    change.adopt();
    disk_.image_.next_packed = HostOffset(0);  // its cluster may be free
    disk_.image_.inflated.drop_all();
    known.remove(g.cluster_of(old_table.begin), g.clusters_for(old_table.length));
    known.add(g.cluster_of(change.snapshot_table_offset()), g.clusters_for(table_bytes));
    outcome.freed.push_back(old_table);
    for (const HostRange& table : outcome.freed)
      if (!table.empty()) disk_.allocator_.quarantine(table.begin, g.clusters_for(table.length), HostSpace::keep);
  }
  change.commit();
  disk_.header_.snapshot_count = static_cast<uint32_t>(outcome.snapshots.size());
  disk_.header_.snapshots_offset = change.snapshot_table_offset();
  disk_.size_ = outcome.size;
  disk_.bitmaps_.resize(outcome.size);
  if (outcome.new_content) disk_.bitmaps_.record({GuestOffset(0), outcome.size});  // nobody knows what is the same
  Lock own(mutex_);
  table_ = {std::move(outcome.snapshots), table_bytes};
}

// ---- Reading a snapshot

Result<std::unique_ptr<Disk>> Qcow2Snapshots::open(const std::string& id_or_name) {
  const auto lease = disk_.ranges_.shared(kEverything);
  std::vector<Snapshot> known = snapshots();
  {
    Lock lock(mutex_);
    if (damage_) return fail(*damage_);
  }
  IMG_LET(const size_t found, find_snapshot(known, id_or_name));
  IMG_LET(Header header, as_of_snapshot(disk_.header_, known[found]));
  const auto open_backing = [this](const std::string&,
                                   const std::optional<std::string>&) -> Result<std::unique_ptr<Disk>> {
    if (!disk_.backing_) return nullptr;
    return std::make_unique<BorrowedDisk>(*disk_.backing_);
  };
  auto disk = std::make_unique<Qcow2Disk>(disk_.storage_, std::move(header),
                                          OpenParameters{.read_only = true,
                                                         .metadata_cache = kSnapshotCache,
                                                         .compressed_cache = disk_.image_.inflated.cache(),
                                                         .hold = hold(known[found])});
  IMG_TRY(disk->start(open_backing, {}));
  return disk;
}

/// Keeps the snapshot from being removed while it lives.
std::shared_ptr<const void> Qcow2Snapshots::hold(const Snapshot& snapshot) {
  Lock lock(mutex_);
  std::weak_ptr<const void>& open = open_[snapshot.l1_offset.bytes()];
  std::shared_ptr<const void> held = open.lock();
  if (!held) open = held = std::make_shared<char>();
  return held;
}

}  // namespace imgfuse::qcow2
