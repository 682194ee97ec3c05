#include "fuse/snapshot_folder.h"

#include <fmt/format.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "fuse/snapshot_disk.h"

namespace imgfuse::fuse {
namespace {

constexpr size_t kMaxName = 255;
constexpr std::string_view kExtension = ".raw";
constexpr size_t kMaxIdInName = 32;

/// Tells a snapshot from a later one that got its id.
using Identity = std::tuple<std::string, std::string, uint32_t, uint32_t, uint64_t, uint64_t>;

Identity identity_of(const SnapshotInfo& snapshot) {
  return {snapshot.id,        snapshot.name,          snapshot.date_sec,
          snapshot.date_nsec, snapshot.vm_clock_nsec, snapshot.disk_size};
}

timespec date_of(const SnapshotInfo& snapshot) {
  return {static_cast<time_t>(snapshot.date_sec), static_cast<long>(std::min(snapshot.date_nsec, 999'999'999u))};
}

FileOwner readers_only(FileOwner owner) {
  owner.mode &= ~static_cast<mode_t>(0222);
  return owner;
}

std::string safe_text(std::string_view text) {
  std::string safe;
  for (const char c : text) safe += static_cast<unsigned char>(c) < 0x20 || c == 0x7f || c == '/' ? '_' : c;
  return safe;
}

}  // namespace

struct SnapshotFolder::Entry {
  Entry(Snapshots& snapshots, const SnapshotInfo& snapshot, uint32_t cluster_size, const FileOwner& owner)
      : disk(snapshots, snapshot, cluster_size), file(disk, owner, date_of(snapshot)) {}

  SnapshotDisk disk;
  RawFile file;
  Node node = {};
};

std::string safe_file_name(std::string_view name, std::string_view suffix) {
  std::string safe = safe_text(name);
  const size_t room = kMaxName - suffix.size() - kExtension.size();
  if (safe.size() > room) {
    // Not in the middle of a character.
    size_t end = room;
    while (end > 0 && (static_cast<unsigned char>(safe[end]) & 0xc0) == 0x80) --end;
    safe.resize(end);
  }
  return safe.append(suffix).append(kExtension);
}

SnapshotFolder::SnapshotFolder(Disk& disk, NodeNumber folder, NodeNumber first, const FileOwner& owner)
    : snapshots_(*disk.snapshots()),
      cluster_size_(disk.info().cluster_size),
      folder_(folder),
      owner_(readers_only(owner)),
      next_(first) {
  refresh();
}

void SnapshotFolder::refresh() {
  const Result<std::vector<SnapshotInfo>> known = snapshots_.list();
  // A damaged table was said to be one when the image was opened: nothing in it can be shown.
  const std::vector<SnapshotInfo> list = known ? *known : std::vector<SnapshotInfo>();
  std::vector<std::shared_ptr<Entry>> dropped;  // closed without the lock
  const Lock lock(mutex_);
  std::multimap<Identity, NodeNumber> gone;
  for (const auto& [number, entry] : entries_) gone.emplace(identity_of(entry->disk.snapshot()), number);
  std::vector<const SnapshotInfo*> fresh;
  for (const SnapshotInfo& snapshot : list) {
    if (const auto found = gone.find(identity_of(snapshot)); found != gone.end())
      gone.erase(found);
    else
      fresh.push_back(&snapshot);
  }
  for (const auto& [identity, number] : gone) {
    const auto entry = entries_.find(number);
    names_.erase(entry->second->node.name);
    dropped.push_back(std::move(entry->second));
    entries_.erase(entry);
  }
  for (const SnapshotInfo* snapshot : fresh) add(*snapshot);
}

void SnapshotFolder::add(const SnapshotInfo& snapshot) {
  auto entry = std::make_shared<Entry>(snapshots_, snapshot, cluster_size_, owner_);
  entry->node = {next_, folder_, free_name(snapshot), &entry->file, &entry->disk};
  names_[entry->node.name] = next_;
  entries_[next_++] = std::move(entry);
}

std::string SnapshotFolder::free_name(const SnapshotInfo& snapshot) const {
  const std::string_view name = snapshot.name.empty() ? snapshot.id : snapshot.name;
  const std::string plain = safe_file_name(name, "");
  if (plain != kExtension && !names_.contains(plain)) return plain;
  if (snapshot.id.size() <= kMaxIdInName) {
    const std::string with_id = safe_file_name(name, safe_text("~" + snapshot.id));
    if (!names_.contains(with_id)) return with_id;
  }
  // Two with the same id, which only a damaged image has.
  for (NodeNumber number = next_;; ++number) {
    const std::string with_number = safe_file_name(name, fmt::format("~~{}", number));
    if (!names_.contains(with_number)) return with_number;
  }
}

void SnapshotFolder::close_all() {
  std::vector<std::shared_ptr<Entry>> all;
  {
    const Lock lock(mutex_);
    for (const auto& [number, entry] : entries_) all.push_back(entry);
  }
  for (const auto& entry : all) entry->disk.shut();
}

NodeRef SnapshotFolder::find(NodeNumber number) const {
  const Lock lock(mutex_);
  const auto found = entries_.find(number);
  return found == entries_.end() ? nullptr : NodeRef(found->second, &found->second->node);
}

NodeRef SnapshotFolder::find(std::string_view name) const {
  const Lock lock(mutex_);
  const auto found = names_.find(name);
  if (found == names_.end()) return nullptr;
  const auto& entry = entries_.at(found->second);
  return NodeRef(entry, &entry->node);
}

std::vector<NodeRef> SnapshotFolder::children() const {
  const Lock lock(mutex_);
  std::vector<NodeRef> nodes;
  for (const auto& [number, entry] : entries_) nodes.emplace_back(entry, &entry->node);
  return nodes;
}

}  // namespace imgfuse::fuse
