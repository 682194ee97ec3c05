#include "job/increment.h"

#include <algorithm>

#include "base/math.h"

namespace imgfuse::job {

Result<std::unique_ptr<Increment>> Increment::begin(Disk& disk, const std::string& bitmap, uint64_t granularity) {
  Bitmaps* const bitmaps = disk.bitmaps();
  if (bitmaps == nullptr) return fail(ErrorCode::unsupported, "there are no bitmaps in {} images", disk.info().format);
  for (const BitmapInfo& info : bitmaps->list())
    if (info.name == bitmap && !info.recording)
      return fail(ErrorCode::invalid, "bitmap {:?} does not record changes", bitmap);
  return std::unique_ptr<Increment>(new Increment(disk, *bitmaps, bitmap, granularity));
}

Increment::Increment(Disk& disk, Bitmaps& bitmaps, const std::string& bitmap, uint64_t granularity)
    : disk_(disk),
      bitmaps_(bitmaps),
      bitmap_(bitmap),
      granularity_(granularity),
      since_(divide_up(disk.size(), granularity)) {}

Result<std::vector<GuestRange>> Increment::changed() const {
  return bitmaps_.changed(bitmap_, {GuestOffset(0), disk_.size()});
}

void Increment::add(GuestRange range) {
  const Lock lock(mutex_);
  since_.set(range.begin.bytes() / granularity_, divide_up(range.end().bytes(), granularity_));
}

Result<> Increment::reset() {
  std::vector<GuestRange> since;
  {
    const Lock lock(mutex_);
    for (uint64_t begin = since_.next_set(0); begin < since_.size();) {
      const uint64_t end = since_.next_clear(begin);
      const uint64_t first = begin * granularity_;
      since.push_back({GuestOffset(first), std::min(end * granularity_, disk_.size()) - first});
      begin = since_.next_set(end);
    }
  }
  auto reset = bitmaps_.assign(bitmap_, since);
  if (!reset) return fail(reset.error().during("reset bitmap {:?}", bitmap_));
  return {};
}

}  // namespace imgfuse::job
