// The persistent dirty bitmaps of an open image (FORMAT.md, "Bitmaps").
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/latch.h"
#include "base/mutex.h"
#include "core/flusher.h"
#include "core/range_lock.h"
#include "format/qcow2/allocator.h"
#include "format/qcow2/bitmap_bits.h"
#include "format/qcow2/bitmap_directory.h"
#include "format/qcow2/image.h"
#include "imgfuse/bitmaps.h"

namespace imgfuse::qcow2 {

/// Bitmaps are read when the image is opened and written when it is closed; in between the disk says `in use` of all
/// of them, so that a crash cannot leave one that looks valid and is not.
///
/// record() is called by every change of guest data, under the request's lease, and takes no lock: whoever changes the
/// set of bitmaps that record holds an exclusive lease on the whole disk.
class DirtyBitmaps final : public Bitmaps {
 public:
  DirtyBitmaps(Image& image, Allocator& allocator, RangeLock& ranges, Latch& latch, bool read_only)
      : image_(image), allocator_(allocator), ranges_(ranges), latch_(latch), read_only_(read_only) {}

  /// Reads the directory and, for a writable image, the bits; changes nothing. A directory that cannot be believed is
  /// reported in the log and forgotten.
  Result<> load(const Header& header) EXCLUDES(mutex_);
  /// Whether the image has bitmaps to keep: otherwise autoclear bit 0 must go.
  bool stored() const { return stored_; }
  /// Says `in use` on disk, durably: from here on guest data may change.
  Result<> mark_in_use() EXCLUDES(mutex_);

  /// The guest's data in the range is about to change. Under the request's lease.
  void record(GuestRange range) {
    for (BitmapBits* bits : recording_) bits->set(range);
  }
  /// From here on the guest's data may change without a word: no bitmap can be added that would record it. False if
  /// there is one. Under an exclusive lease on everything.
  bool stop_watching() EXCLUDES(mutex_);
  /// The disk has another size. What it gains counts as changed. Under an exclusive lease on everything.
  void resize(uint64_t size) EXCLUDES(mutex_);

  /// Makes all bitmaps durable and valid. When the image is closed, with everything else durable; frees clusters, so
  /// that flush cycles must follow. Bitmaps for which there is no space stay in use; that is no error.
  Result<> store(Flusher& flusher) EXCLUDES(mutex_);

  std::vector<BitmapInfo> list() const override EXCLUDES(mutex_);
  Result<> add(const std::string& name, uint64_t granularity) override EXCLUDES(mutex_);
  Result<> remove(const std::string& name) override EXCLUDES(mutex_);
  Result<> assign(const std::string& name, const std::vector<GuestRange>& changed) override EXCLUDES(mutex_);
  Result<std::vector<GuestRange>> changed(const std::string& name, GuestRange range) const override EXCLUDES(mutex_);

 private:
  struct Bitmap {
    BitmapEntry entry;                 // its table is empty where it was never stored
    bool lost = false;                 // the content cannot be used: it is kept as it is, in use, to be removed
    bool saved = true;                 // but for what is recorded, the disk has its content
    std::unique_ptr<BitmapBits> bits;  // none where what is on disk will do
    std::vector<uint64_t> clusters;    // on disk, of its table and its bits

    bool recording() const { return !lost && (entry.flags & kBitmapAuto) != 0; }
    bool must_be_saved() const { return !saved || (bits && bits->changed()); }
  };

  Result<> adopt(const Header& header, BitmapDirectory directory) REQUIRES(mutex_);
  Result<> claim_clusters() REQUIRES(mutex_);
  Result<> find_clusters(Bitmap& bitmap, uint64_t file_clusters) const;
  Result<> load_bits(Bitmap& bitmap) const REQUIRES(mutex_);
  Result<> read_piece(const Bitmap& bitmap, uint64_t index, Bytes out) const;
  Result<size_t> find(const std::string& name) const REQUIRES(mutex_);
  void lose(Bitmap& bitmap, const Error& why) REQUIRES(mutex_);
  void collect_recording() REQUIRES(mutex_);
  Result<> check_change() const;
  Result<> check_new(const std::string& name, uint64_t granularity) const REQUIRES(mutex_);
  Result<> check_fits(uint64_t size, unsigned granularity_bits) const REQUIRES(mutex_);
  Result<> resize_bits(Bitmap& bitmap, uint64_t size) REQUIRES(mutex_);

  // dirty_bitmaps_store.cc
  bool unchanged() const REQUIRES(mutex_);
  Result<> write_flags(bool in_use) REQUIRES(mutex_);
  Result<> store_anew(Flusher& flusher) REQUIRES(mutex_);
  Result<> switch_header(size_t count, HostRange directory);
  void free_clusters(std::vector<uint64_t> clusters);

  Image& image_;
  Allocator& allocator_;
  RangeLock& ranges_;
  Latch& latch_;
  const bool read_only_;
  bool stored_ = false;  // fixed after load(): the image's header says that there are bitmaps

  std::vector<BitmapBits*> recording_;  // under a lease; changed under an exclusive one on everything

  mutable Mutex mutex_{LockRank::tables};  // held across I/O; taken behind a lease, never before one
  uint64_t size_ GUARDED_BY(mutex_) = 0;   // of the disk
  HostRange directory_ GUARDED_BY(mutex_);
  std::vector<Bitmap> bitmaps_ GUARDED_BY(mutex_);
  bool watching_ GUARDED_BY(mutex_) = true;           // every change is recorded
  size_t stored_count_ GUARDED_BY(mutex_) = 0;        // bitmaps in the directory
  std::vector<uint64_t> removed_ GUARDED_BY(mutex_);  // clusters of bitmaps that were removed
  bool any_removed_ GUARDED_BY(mutex_) = false;
};

}  // namespace imgfuse::qcow2
