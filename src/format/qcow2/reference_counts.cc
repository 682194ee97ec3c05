#include "format/qcow2/reference_counts.h"

#include <algorithm>

#include "format/qcow2/refcounts.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint32_t kWidest = 32;

constexpr uint64_t largest_of(uint32_t bits) { return (uint64_t{1} << bits) - 1; }

}  // namespace

bool MemoryBudget::take(uint64_t bytes) {
  if (exhausted_ || bytes > left_) {
    exhausted_ = true;
    return false;
  }
  left_ -= bytes;
  return true;
}

void ReferenceCounts::add(uint64_t cluster, uint64_t times) {
  if (times == 0 || budget_.exhausted()) return;
  const uint64_t index = cluster / kPageClusters;
  if (index >= pages_.size()) {
    const uint64_t wanted = std::max<uint64_t>(index + 1, pages_.size() * 2);
    if (!budget_.take((wanted - pages_.size()) * sizeof(Page))) return;
    pages_.resize(wanted);
  }
  Page& page = pages_[index];
  const uint64_t slot = cluster % kPageClusters;
  const uint64_t old = page.bits == 0 ? 0 : get_refcount({page.counters.get(), page.size()}, slot, page.bits);
  const uint64_t sum = std::min(old + std::min(times, largest_of(kWidest)), largest_of(kWidest));
  if ((page.bits == 0 || sum > largest_of(page.bits)) && !widen(page, sum)) return;
  set_refcount({page.counters.get(), page.size()}, slot, page.bits, sum);
  end_ = std::max(end_, cluster + 1);
}

bool ReferenceCounts::widen(Page& page, uint64_t largest) {
  Page wider;
  wider.bits = std::max(page.bits, 1u);
  while (largest_of(wider.bits) < largest) wider.bits *= 2;
  if (!budget_.take(wider.size())) return false;
  wider.counters = std::make_unique<std::byte[]>(wider.size());
  if (page.bits != 0) {
    for (uint64_t slot = 0; slot < kPageClusters; ++slot)
      set_refcount({wider.counters.get(), wider.size()}, slot, wider.bits,
                   get_refcount({page.counters.get(), page.size()}, slot, page.bits));
  }
  budget_.give_back(page.size());
  page = std::move(wider);
  return true;
}

uint64_t ReferenceCounts::get(uint64_t cluster) const {
  const uint64_t index = cluster / kPageClusters;
  if (index >= pages_.size() || pages_[index].bits == 0) return 0;
  const Page& page = pages_[index];
  return get_refcount({page.counters.get(), page.size()}, cluster % kPageClusters, page.bits);
}

std::optional<uint64_t> ReferenceCounts::next(uint64_t cluster) const {
  while (cluster < end_) {
    if (pages_[cluster / kPageClusters].bits == 0) {
      cluster = (cluster / kPageClusters + 1) * kPageClusters;
      continue;
    }
    if (get(cluster) != 0) return cluster;
    ++cluster;
  }
  return std::nullopt;
}

void ReferenceCounts::clear() {
  for (const Page& page : pages_) budget_.give_back(page.size());
  budget_.give_back(pages_.size() * sizeof(Page));
  pages_.clear();
  pages_.shrink_to_fit();
  end_ = 0;
}

}  // namespace imgfuse::qcow2
