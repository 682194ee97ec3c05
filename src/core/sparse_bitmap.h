// A set of numbers, most of them near each other.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>

#include "imgfuse/error.h"

namespace imgfuse {

/// Which host clusters a check has met. Takes a bit for each cluster of stretches in which there are some, and no more
/// memory than it is allowed: an image can ask for any amount. One thread.
class SparseBitmap {
 public:
  explicit SparseBitmap(uint64_t max_bytes) : max_pages_(max_bytes / sizeof(Page)) {}

  /// Returns whether it was not in the set before. Fails when the memory is used up.
  Result<bool> add(uint64_t number) {
    std::unique_ptr<Page>& page = pages_[number / kBits];
    if (!page) {
      if (pages_.size() > max_pages_)
        return fail(ErrorCode::unsupported, "the image's clusters lie too far apart to be counted in {} MiB",
                    max_pages_ * sizeof(Page) >> 20);
      page = std::make_unique<Page>();
    }
    uint64_t& word = page->words[number % kBits / 64];
    const uint64_t bit = uint64_t{1} << number % 64;
    const bool is_new = (word & bit) == 0;
    word |= bit;
    count_ += is_new;
    return is_new;
  }
  /// How many numbers are in the set.
  uint64_t count() const { return count_; }

 private:
  static constexpr uint64_t kBits = 32768;
  struct Page {
    uint64_t words[kBits / 64] = {};
  };

  const uint64_t max_pages_;
  uint64_t count_ = 0;
  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
};

}  // namespace imgfuse
