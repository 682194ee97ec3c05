// The bitmap that an incremental backup goes by.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "core/bitmap.h"
#include "imgfuse/bitmaps.h"
#include "imgfuse/disk.h"

namespace imgfuse::job {

/// Remembers what changes since the backup began. The persistent bitmap goes on as if there were none, so that nothing
/// is lost if the backup fails; when it has succeeded it is told what has changed since it began, and forgets the rest.
class Increment {
 public:
  /// While nobody changes the disk, which is borrowed. `granularity`: bytes per bit of what is remembered.
  static Result<std::unique_ptr<Increment>> begin(Disk& disk, const std::string& bitmap, uint64_t granularity);
  /// What the bitmap says.
  Result<std::vector<GuestRange>> changed() const;

  /// The range has changed. Any thread may call.
  void add(GuestRange range) EXCLUDES(mutex_);
  /// The backup has succeeded. While nobody changes the disk.
  Result<> reset() EXCLUDES(mutex_);

 private:
  Increment(Disk& disk, Bitmaps& bitmaps, const std::string& bitmap, uint64_t granularity);

  Disk& disk_;
  Bitmaps& bitmaps_;
  const std::string bitmap_;
  const uint64_t granularity_;
  Mutex mutex_;
  Bitmap since_ GUARDED_BY(mutex_);
};

}  // namespace imgfuse::job
