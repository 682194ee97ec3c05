// Disk: what a guest sees. Start reading here.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "imgfuse/error.h"
#include "imgfuse/statistics.h"
#include "imgfuse/storage.h"
#include "imgfuse/units.h"

namespace imgfuse {

class BackgroundCopy;
class Bitmaps;
class Jobs;
class Snapshots;

/// What a disk is and can do. Fixed while it is open, but for `size`, which resize() changes.
struct DiskInfo {
  std::string name;           ///< the image's path, for messages
  std::string format;         ///< "raw", "qcow2", "qed", "fvd"
  uint64_t size = 0;          ///< virtual size in bytes
  uint32_t cluster_size = 0;  ///< unit of allocation in bytes, any multiple of 512; raw: 4096
  bool read_only = true;
  uint32_t subcluster_size = 0;           ///< unit in which clusters are filled and discarded; 0: the cluster size
  bool leaves_backing_when_full = false;  ///< and not before: also what reads as zeros has to be populated for that
};

/// What a stretch of the guest disk reads as, and where its bytes lie.
enum class ExtentKind {
  data,  ///< stored bytes
  zero,  ///< reads as zeros because a layer says so
  hole,  ///< no layer holds it: reads as zeros
};

struct Extent {
  GuestRange range;
  ExtentKind kind = ExtentKind::hole;
  uint32_t depth = 0;  ///< the layer that decides: 0 is this disk, 1 its backing file, …
  bool compressed = false;
  bool allocated = false;  ///< that layer has host space for it (zero clusters may keep theirs)
  bool has_host_offset = false;
  HostOffset host;  ///< in that layer's file; only with has_host_offset
};

/// How much of a new area gets host space at once: nothing, tables only, reserved space, written zeros.
enum class Preallocation { off, metadata, falloc, full };

/// Whether zeroed clusters may give up their host space.
enum class Zeroing { keep_allocation, may_free };

/// What becomes of zeros that the guest writes: bytes like others, a zeroing that keeps host space, one that frees it.
enum class DetectZeroes { off, on, unmap };

/// What populate() does with what reads as zeros in the layers below.
enum class Holes {
  fill,  ///< gives it host space
  keep,  ///< makes it zeros without host space, where the format has such
};

/// How resize() goes about it.
struct ResizeOptions {
  bool shrink = false;                               ///< what lies behind the new end may be lost
  Preallocation preallocation = Preallocation::off;  ///< of the area that is added
};

/// One virtual disk, the top of its backing chain.
///
/// Threads: any thread may call anything at any time, overlapping requests included; all calls may block.
/// Errors: a failed request changed nothing that was acknowledged before. After a failed metadata write or host flush
/// the disk latches: writes and flushes return that first error until it is opened again; reads go on.
///
/// The public functions check the request (range, emptiness, read-only) and call the private virtual ones, which
/// therefore never see an empty, overflowing or out-of-range request.
class Disk {
 public:
  Disk() = default;
  Disk(const Disk&) = delete;
  Disk& operator=(const Disk&) = delete;
  virtual ~Disk() = default;

  /// A copy, since resize() changes the size.
  DiskInfo info() const { return do_info(); }
  uint64_t size() const { return do_size(); }

  Result<> read(GuestOffset offset, Bytes out);
  Result<> write(GuestOffset offset, ConstBytes data);
  /// The range reads as zeros afterwards.
  Result<> write_zeroes(GuestRange range, Zeroing zeroing);
  /// The guest no longer needs the range: whole clusters in it read as zeros afterwards and are freed, the rest is
  /// left alone.
  Result<> discard(GuestRange range);
  /// Makes the range local to this layer without changing what it reads as: with host space for every cluster of it,
  /// or for those only that have data.
  Result<> populate(GuestRange range, Holes holes = Holes::fill);
  /// This layer gives up what it holds of the whole clusters in the range: they read as the layer below does, or as
  /// zeros where there is none.
  Result<> forget(GuestRange range);
  /// Extents that cover the front of `range`, in order, without gaps; neighbours that could be one are merged.
  /// Stops early after `max_extents`. Looks through the whole chain.
  Result<std::vector<Extent>> map(GuestRange range, size_t max_extents = 1024);
  /// From here on every write, zeroing and discard is durable, metadata included, when it returns.
  void set_write_through() { write_through_ = true; }
  /// To be called before the first request.
  void set_detect_zeroes(DetectZeroes mode);
  /// Everything acknowledged before the call is durable when it returns. Concurrent calls share the work.
  Result<> flush();
  Result<> resize(uint64_t size, ResizeOptions options = {});
  /// Writes everything out, marks the image clean where its format has such a mark, and drops the locks. No other
  /// call may follow. A writable disk must be closed before it is destroyed.
  Result<> close();
  /// Guest bytes that have host space in this layer (an estimate until count_allocated() has run).
  uint64_t allocated() const { return do_allocated(); }
  /// Makes allocated() exact. Reads all tables, in small steps beside other requests; stops early when `stop` is set.
  Result<> count_allocated(const std::atomic<bool>& stop) { return do_count_allocated(stop); }
  /// Internal snapshots, where the format has them (else null). They live as long as the disk is open.
  virtual Snapshots* snapshots() { return nullptr; }
  /// Persistent dirty bitmaps, where the format has them (else null).
  virtual Bitmaps* bitmaps() { return nullptr; }
  /// What is copied from the backing file in the background (else null).
  virtual BackgroundCopy* background_copy() { return nullptr; }
  /// Jobs on the disk while it is in use, where somebody provides for them (else null): see jobs.h.
  virtual Jobs* jobs() { return nullptr; }
  virtual DiskStatistics statistics() const { return {}; }
  /// A host file that has exactly the disk's bytes, for somebody who reads it himself, and writes it unless the disk is
  /// read-only; -1: there is none. Valid until close(). Nobody may ask who has to know of each write.
  virtual int share_host_file() { return -1; }

 private:
  virtual DiskInfo do_info() const = 0;
  virtual uint64_t do_size() const = 0;
  virtual Result<> do_read(GuestOffset offset, Bytes out) = 0;
  virtual Result<> do_write(GuestOffset offset, ConstBytes data) = 0;
  virtual Result<> do_write_zeroes(GuestRange range, Zeroing zeroing) = 0;
  virtual Result<> do_populate(GuestRange range, Holes holes) = 0;
  virtual Result<> do_forget(GuestRange range);
  virtual Result<std::vector<Extent>> do_map(GuestRange range, size_t max_extents) = 0;
  virtual Result<> do_flush() = 0;
  virtual Result<> do_resize(uint64_t size, ResizeOptions options) = 0;
  virtual Result<> do_close() = 0;
  virtual uint64_t do_allocated() const = 0;
  virtual Result<> do_count_allocated(const std::atomic<bool>& stop) = 0;

  Result<> check_range(GuestOffset offset, uint64_t length) const;
  Result<> check_writable() const;
  GuestRange whole_units(GuestRange range, uint32_t unit) const;
  Result<> write_detecting(GuestOffset offset, ConstBytes data);
  /// Ends a change: flushes it in write-through mode.
  Result<> finish(Result<> change);

  bool write_through_ = false;
  uint32_t detect_unit_ = 0;  // unit in which zeros are looked for; 0: they are not
  Zeroing detected_ = Zeroing::keep_allocation;
};

}  // namespace imgfuse
