// ModelDisk: what a guest disk may read as, sector by sector.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "imgfuse/disk.h"
#include "support/mem_storage.h"
#include "support/random.h"

namespace imgfuse::test {

/// The oracle of random tests. It holds a few windows of the guest disk as flat bytes, and for each of their sectors
/// the versions that a crash may bring back: the last flushed one and all that came later. Not thread-safe.
class ModelDisk {
 public:
  static constexpr uint64_t kSector = 512;

  /// Windows: sector aligned, without overlap. `initial` is what the disk reads as, durably.
  ModelDisk(uint64_t disk_size, std::vector<GuestRange> windows, const MemImage& initial);

  uint64_t disk_size() const { return disk_size_; }
  const std::vector<GuestRange>& windows() const { return windows_; }

  /// Call it before the disk is asked, so that a crash in the middle knows the new version. The range lies in one
  /// window.
  void write(GuestOffset offset, ConstBytes data);
  void zero(GuestRange range);
  /// The front of what the disk gains, up to `window` bytes, becomes a window of zeros.
  void grow(uint64_t disk_size, uint64_t window);
  /// The growth was acknowledged, and is durable therefore.
  void grown() { least_size_ = disk_size_; }
  /// It was not, and the disk is as long as before.
  void not_grown(uint64_t disk_size);
  /// A flush was acknowledged that was asked for after all changes so far.
  void flushed();

  /// What is wrong with the first sector that reads as none of its versions; empty: all is well.
  std::string compare(Disk& disk) const;
  /// As compare() against the newest version only: for a disk that has not crashed.
  std::string compare_exactly(Disk& disk) const;
  /// Takes over what the disk reads as, which must be one of the versions, as the newest one: after a failed request.
  std::string adopt(Disk& disk);
  /// As adopt(), and nothing else is left: after a crash.
  std::string settle(Disk& disk);

 private:
  struct Sector {
    std::vector<uint64_t> versions;  // hashes, oldest first; the last is the current one
  };
  struct Window {
    GuestRange range;
    std::vector<std::byte> content;  // the newest version
    std::vector<Sector> sectors;
  };
  template <class Accept>
  std::string find_wrong(Disk& disk, Accept accept) const;
  Window& window_at(GuestRange range);
  void add_versions(Window& window, uint64_t begin, uint64_t end);

  uint64_t disk_size_;
  uint64_t least_size_;  // what a crash may leave
  std::vector<GuestRange> windows_;
  std::vector<Window> content_;
  std::vector<std::pair<uint32_t, uint32_t>> unflushed_;  // window, sector: those with more than one version
};

/// How often each kind of request comes, and how large.
struct Workload {
  uint64_t cluster_size = 65536;
  bool subclusters = false;  ///< requests follow these borders as well
  bool zeroing = true;
  bool discards = true;
  bool populate = true;
  bool growth = false;
  bool loose = false;  ///< most of what is written can be compressed
  bool zeros = false;  ///< some of what is written is, in stretches
  unsigned flush_one_in = 6;
};

/// Makes one random request of `disk` and of `model` alike: allocating, overwriting, partial and overlapping writes,
/// zeroing in both modes, discards, growth, flushes. Returns the disk's result, with the request in `what`.
Result<> random_request(Disk& disk, ModelDisk& model, const Workload& workload, Rng& rng, std::string& what);

/// Windows that make metadata work: at the start, around the borders of L2 tables, and at the end of the disk.
/// `coverage`: guest bytes per L2 table; 0: as many as a table of one cluster maps.
std::vector<GuestRange> windows_for(uint64_t disk_size, uint64_t cluster_size, uint64_t clusters_per_window,
                                    uint64_t coverage = 0);

}  // namespace imgfuse::test
