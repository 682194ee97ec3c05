// The internal snapshots of an open qcow2 image.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "format/qcow2/snapshot_table.h"
#include "format/qcow2/tree_change.h"
#include "imgfuse/snapshots.h"

namespace imgfuse::qcow2 {

class Qcow2Disk;

/// A change takes the whole disk exclusively, writes everything out, and then lets a TreeChange happen: one write to
/// the header makes it real. Opening takes the whole disk shared, so that it meets no change half-way.
class Qcow2Snapshots final : public Snapshots {
 public:
  explicit Qcow2Snapshots(Qcow2Disk& disk) : disk_(disk) {}

  /// Reads the snapshot table. A damaged one is an error of every later call, not of opening the disk.
  void load();

  Result<std::vector<SnapshotInfo>> list() const override;
  Result<SnapshotInfo> create(const std::string& name) override;
  Result<> apply(const std::string& id_or_name) override;
  Result<> remove(const std::string& id_or_name) override;
  Result<std::unique_ptr<Disk>> open(const std::string& id_or_name) override;

 private:
  /// What a change leads to, besides the trees.
  struct Outcome {
    std::vector<Snapshot> snapshots;
    uint64_t size = 0;
    std::vector<HostRange> freed;  ///< tables, in bytes
    bool new_content = false;      ///< the active disk is another one
    bool frees_data = false;
  };

  std::vector<Snapshot> snapshots() const;
  Result<> check_changeable() const;
  Result<L1Table> read_l1(const Snapshot& snapshot) const;
  Result<> perform(TreeChange::Plan plan, Outcome outcome);
  Result<> prepare(TreeChange& change, const std::vector<std::byte>& table);
  Result<> switch_header(const TreeChange& change, const Outcome& outcome);
  void adopt(TreeChange& change, Outcome outcome, uint64_t table_bytes);
  std::shared_ptr<const void> hold(const Snapshot& snapshot);

  Qcow2Disk& disk_;

  mutable Mutex mutex_;
  SnapshotTable table_ GUARDED_BY(mutex_);  // changed under an exclusive lease on the whole disk
  std::optional<Error> damage_ GUARDED_BY(mutex_);
  /// Snapshots that are open, by the place of their L1 table.
  std::map<uint64_t, std::weak_ptr<const void>> open_ GUARDED_BY(mutex_);
};

/// The header of an image whose active disk is the snapshot. Checks what it takes from there.
Result<Header> as_of_snapshot(const Header& header, const Snapshot& snapshot);

}  // namespace imgfuse::qcow2
