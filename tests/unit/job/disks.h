// Disks for the tests of jobs.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "format/raw/raw.h"
#include "imgfuse/job.h"
#include "support/builders.h"
#include "support/fault_storage.h"

namespace imgfuse::test {

struct CloseDisk {
  void operator()(Disk* disk) const {
    (void)disk->close();
    delete disk;
  }
};

/// A disk in memory, with the storage that it lies in. Closed at the end.
struct JobDisk {
  std::shared_ptr<MemStorage> memory;
  std::shared_ptr<FaultStorage> faults;
  std::unique_ptr<Disk, CloseDisk> disk;

  Disk* operator->() const { return disk.get(); }
  Disk& operator*() const { return *disk; }
};

inline JobDisk raw_disk(uint64_t size) {
  MemImage image;
  image.resize(size);
  auto memory = std::make_shared<MemStorage>(std::move(image));
  auto faults = std::make_shared<FaultStorage>(memory);
  auto disk = must(raw::open(faults, {}));
  return {memory, faults, std::unique_ptr<Disk, CloseDisk>(disk.release())};
}

inline JobDisk disk_of(MemImage image, MemImage backing = {}) {
  auto memory = std::make_shared<MemStorage>(std::move(image));
  auto faults = std::make_shared<FaultStorage>(memory);
  auto disk = must(open_image(faults, {.backing = std::move(backing)}));
  return {memory, faults, std::unique_ptr<Disk, CloseDisk>(disk.release())};
}

inline JobDisk qcow2_disk(const Qcow2Spec& spec, MemImage backing = {}) {
  return disk_of(make_qcow2(spec), std::move(backing));
}

inline std::vector<std::byte> content(Disk& disk) { return read_all(disk, GuestOffset(0), disk.size()); }

/// Data, zeros and holes of all lengths in random places.
inline void scribble(Disk& disk, Rng& rng, unsigned times = 40) {
  for (unsigned i = 0; i < times; ++i) {
    const uint64_t length = std::min(disk.size(), uint64_t{1} << rng.between(0, 20));
    const GuestOffset offset(rng.below(disk.size() - length + 1));
    switch (rng.below(5)) {
      case 0:
        must(disk.write_zeroes({offset, length}, Zeroing::keep_allocation));
        break;
      case 1:
        must(disk.discard({offset, length}));
        break;
      case 2:
        must(disk.write(offset, std::vector<std::byte>(length)));
        break;
      default:
        must(disk.write(offset, pattern(length, rng.next())));
    }
  }
}

inline MemImage scribbled_image(uint64_t size, Rng& rng) {
  JobDisk disk = raw_disk(size);
  scribble(*disk, rng);
  return disk.memory->image();
}

}  // namespace imgfuse::test
