// The bits of a dirty bitmap in memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "imgfuse/storage.h"
#include "imgfuse/units.h"

namespace imgfuse::qcow2 {

/// One bit per granule of the guest disk. Memory that never had a bit set is not touched, so the host need not provide
/// it. set() may be called by any number of threads, beside everything but the destructor, and takes no lock.
class BitmapBits {
 public:
  BitmapBits(uint64_t disk_size, unsigned granularity_bits);

  /// Bytes of memory that the bits of a disk may come to need.
  static uint64_t memory_for(uint64_t disk_size, unsigned granularity_bits);

  uint64_t granules() const { return granules_; }
  /// As the bits are stored, without padding.
  uint64_t bytes() const { return (granules_ + 7) / 8; }

  /// Every granule that the range touches. The range lies inside the disk.
  void set(GuestRange range);
  /// A bit that was clear has been set since the bits were made.
  bool changed() const { return changed_.load(std::memory_order_relaxed); }
  /// Part of the stored form: the byte at `first` and those behind it, zeros past the last granule.
  void save(uint64_t first, Bytes out) const;
  /// Sets what is set in a part of the stored form, which is no change. Bits past the last granule are left out.
  void merge(uint64_t first, ConstBytes stored);

 private:
  struct Free {
    void operator()(uint64_t* p) const { std::free(p); }
  };
  bool set_bits(uint64_t word, uint64_t mask);

  const uint64_t granules_;
  const unsigned granularity_bits_;
  std::atomic<bool> changed_ = false;
  std::unique_ptr<uint64_t[], Free> words_;  // by atomic operations; bit k of word i is granule 64 i + k
};

}  // namespace imgfuse::qcow2
