// Who does not want to wait for a disk, and only notes what was missing.
#pragma once

#include <vector>

#include "base/no_wait.h"

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

}  // namespace imgfuse::test
