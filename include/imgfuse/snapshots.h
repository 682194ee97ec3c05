// Internal snapshots of an open disk.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "imgfuse/check.h"
#include "imgfuse/disk.h"
#include "imgfuse/error.h"

namespace imgfuse {

/// What Disk::snapshots() gives. A snapshot is named by its id or by its name, as qemu-img resolves them: the id first,
/// then the name.
///
/// Threads: any thread may call anything while the disk is open. A change waits until requests in flight have ended and
/// holds later ones back, so what was acknowledged before it is in, and nothing later is.
class Snapshots {
 public:
  virtual ~Snapshots() = default;

  /// Fails where the snapshot table is damaged; the disk itself can be used all the same.
  virtual Result<std::vector<SnapshotInfo>> list() const = 0;
  /// Durable when it returns, and so is everything that was acknowledged before.
  virtual Result<SnapshotInfo> create(const std::string& name) = 0;
  /// The disk becomes what it was; what was written since is lost unless another snapshot holds it.
  virtual Result<> apply(const std::string& id_or_name) = 0;
  virtual Result<> remove(const std::string& id_or_name) = 0;
  /// What the disk was then, read-only, with the size it had. To be closed before the disk it belongs to; removing the
  /// snapshot meanwhile is refused.
  virtual Result<std::unique_ptr<Disk>> open(const std::string& id_or_name) = 0;
};

}  // namespace imgfuse
