// Persistent dirty bitmaps of an open disk: which parts changed since the bitmap was added or cleared.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "imgfuse/error.h"
#include "imgfuse/units.h"

namespace imgfuse {

struct BitmapInfo {
  std::string name;
  uint64_t granularity = 65536;  ///< guest bytes per bit, a power of two
  bool in_use = false;           ///< inconsistent: a writer did not store it; it can only be removed
  bool recording = false;        ///< `auto`: every writer keeps it
};

/// What Disk::bitmaps() gives.
///
/// Threads: any thread may call anything while the disk is open.
class Bitmaps {
 public:
  virtual ~Bitmaps() = default;

  virtual std::vector<BitmapInfo> list() const = 0;
  /// A new bitmap, clear and recording. `granularity`: 512 B to 2 GiB, a power of two.
  virtual Result<> add(const std::string& name, uint64_t granularity) = 0;
  virtual Result<> remove(const std::string& name) = 0;
  Result<> clear(const std::string& name) { return assign(name, {}); }
  /// Just these parts have changed, whatever it said before.
  virtual Result<> assign(const std::string& name, const std::vector<GuestRange>& changed) = 0;
  /// The parts that changed, ascending, merged, cut to `range`. Fails for a bitmap that is in use elsewhere or
  /// inconsistent.
  virtual Result<std::vector<GuestRange>> changed(const std::string& name, GuestRange range) const = 0;
};

}  // namespace imgfuse
