#include "format/qed/allocator.h"

#include <algorithm>

namespace imgfuse::qed {

Reservation::~Reservation() {
  if (owner_) owner_->give_back(range_);
}

void Allocator::start(HostOffset end) {
  Lock lock(mutex_);
  end_ = end;
  image_.end = end.bytes();
}

/// The file gets whole clusters. Bytes of a torn last one go first: they would show in a cluster that has to be zero.
Result<> Allocator::resize(HostOffset end) {
  IMG_LET(const uint64_t size, image_.storage.size());
  if (size > end_.bytes() && end > end_) IMG_TRY(image_.storage.resize(end_.bytes()));
  IMG_TRY(image_.storage.resize(end.bytes()));
  end_ = end;
  image_.end = end.bytes();
  return {};
}

Result<Reservation> Allocator::reserve(uint64_t bytes) {
  Lock lock(mutex_);
  const auto used = std::find_if(free_.begin(), free_.end(), [&](const HostRange& r) { return r.length >= bytes; });
  if (used != free_.end()) {
    const HostRange range{used->begin, bytes};
    IMG_TRY(image_.storage.write_zeroes(range));
    *used = {range.end(), used->length - bytes};
    if (used->empty()) free_.erase(used);
    return Reservation(*this, range);
  }
  IMG_TRY(cut_free_end());
  if (bytes > kMaxFileBytes - end_.bytes())
    return fail(ErrorCode::no_space, "the image file of {} bytes cannot grow by {}", end_.bytes(), bytes);
  const HostRange range{end_, bytes};
  IMG_TRY(resize(range.end()));
  return Reservation(*this, range);
}

/// Nobody saw the clusters, so it does not matter what a crash leaves of them. A file that cannot be cut is no loss
/// either.
void Allocator::give_back(HostRange range) {
  Lock lock(mutex_);
  if (range.end() == end_ && resize(range.begin)) return;
  free_.push_back(range);
}

Result<bool> Allocator::cut_free_end() {
  std::sort(free_.begin(), free_.end(), [](const HostRange& a, const HostRange& b) { return a.begin < b.begin; });
  HostOffset end = end_;
  auto kept = free_.end();
  for (; kept != free_.begin() && std::prev(kept)->end() == end; --kept) end = std::prev(kept)->begin;
  if (end == end_) return false;
  IMG_TRY(resize(end));
  free_.erase(kept, free_.end());
  return true;
}

Result<bool> Allocator::trim() {
  Lock lock(mutex_);
  return cut_free_end();
}

}  // namespace imgfuse::qed
