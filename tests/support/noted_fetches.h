// Who does not want to wait for a disk, and only notes what was missing.
#pragma once

#include <vector>

#include "base/no_wait.h"
#include "imgfuse/disk.h"

namespace imgfuse::test {

class NotedFetches final : public NoWait::Fetcher {
 public:
  struct Part {
    int file;
    uint64_t offset;
    size_t length;
    bool operator==(const Part&) const = default;
  };
  void fetch(int file, uint64_t offset, size_t length) override { parts.push_back({file, offset, length}); }

  std::vector<Part> parts;
};

/// What a read of the range says that does not want to wait.
inline Result<> read_in_a_hurry(Disk& disk, GuestRange range) {
  NotedFetches fetches;
  const NoWait hurry(fetches, NoWait::Clock::now());
  std::vector<std::byte> out(range.length);
  return disk.read(range.begin, out);
}

}  // namespace imgfuse::test
