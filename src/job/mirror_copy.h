// The I/O of a mirror: bringing what one disk holds to another.
#pragma once

#include <functional>
#include <vector>

#include "imgfuse/disk.h"
#include "imgfuse/jobs.h"

namespace imgfuse::job {

/// Makes `target` read as `source` does in the range, but where a layer decides that is `layers` deep or deeper.
/// `memory`: pieces for the content, together as long as the range. Zeros and holes are not read, and written as such.
/// The error says which side it is.
Result<> copy_range(Disk& source, Disk& target, GuestRange range, const std::vector<Bytes>& memory,
                    uint32_t layers = UINT32_MAX);

/// Makes local what the disk has from layers that are less than `layers` deep; 0: from all of them. A hole that all
/// layers have stays one where the disk can leave its backing file so.
Result<> fill_range(Disk& disk, GuestRange range, uint32_t layers);

/// Finds what is to be copied at the start, a step at a time.
class Survey {
 public:
  struct Shape {
    MirrorSync sync = MirrorSync::full;
    bool target_is_zero = false;  ///< zeros need not be written
    JobKind kind = JobKind::mirror;
    uint32_t layers = 0;  ///< of a stream or a commit: how deep its base lies; 0: there is none
  };
  /// `mark` is told what has to be copied, of a backup what need not be: all of it has to be, until then. The disks are
  /// borrowed.
  Survey(Disk& source, Disk& target, const Shape& shape, std::function<void(GuestRange)> mark)
      : source_(source),
        target_(target),
        shape_(shape),
        mark_(std::move(mark)),
        size_(source.size()),
        fills_all_(source.info().leaves_backing_when_full) {}

  /// Looks at the next stretch. Writes zeros to the target of a mirror where the source reads as zeros, so nothing else
  /// may write there yet. Can be repeated after an error. False when there is no more.
  Result<bool> step();
  uint64_t done() const { return at_; }

 private:
  Result<> look_at(const Extent& extent);
  Result<> look_for_mirror(const Extent& extent);
  void look_for_backup(const Extent& extent);

  Disk& source_;
  Disk& target_;
  const Shape shape_;
  const std::function<void(GuestRange)> mark_;
  const uint64_t size_;
  const bool fills_all_;
  uint64_t at_ = 0;
};

}  // namespace imgfuse::job
