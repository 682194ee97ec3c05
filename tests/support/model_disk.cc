#include "support/model_disk.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "base/buffer.h"
#include "base/math.h"

namespace imgfuse::test {
namespace {

uint64_t hash_sector(const std::byte* bytes) {
  uint64_t hash = 0;
  for (size_t i = 0; i < ModelDisk::kSector; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, sizeof word);
    hash = (hash ^ word) * 0x9e3779b97f4a7c15;
    hash ^= hash >> 32;
  }
  return hash;
}

/// What Disk::discard() promises to zero.
GuestRange discarded(GuestRange range, const DiskInfo& disk, uint64_t disk_size) {
  const uint64_t unit = disk.subcluster_size != 0 ? disk.subcluster_size : disk.cluster_size;
  const uint64_t begin = round_up(range.begin.bytes(), unit);
  const uint64_t end = range.end().bytes() == disk_size ? disk_size : round_down(range.end().bytes(), unit);
  return {GuestOffset(begin), end > begin ? end - begin : 0};
}

}  // namespace

ModelDisk::ModelDisk(uint64_t disk_size, std::vector<GuestRange> windows, const MemImage& initial)
    : disk_size_(disk_size), least_size_(disk_size), windows_(std::move(windows)) {
  for (const GuestRange range : windows_) {
    Window window{range, std::vector<std::byte>(range.length), std::vector<Sector>(range.length / kSector)};
    initial.read(range.begin.bytes(), window.content);
    for (size_t i = 0; i < window.sectors.size(); ++i)
      window.sectors[i].versions = {hash_sector(&window.content[i * kSector])};
    content_.push_back(std::move(window));
  }
}

ModelDisk::Window& ModelDisk::window_at(GuestRange range) {
  for (Window& window : content_)
    if (window.range.begin <= range.begin && range.end() <= window.range.end()) return window;
  assert(false && "a request outside the windows");
  return content_.front();
}

void ModelDisk::add_versions(Window& window, uint64_t begin, uint64_t end) {
  const auto number = static_cast<uint32_t>(&window - content_.data());
  for (uint64_t i = begin / kSector; i < divide_up(end, kSector); ++i) {
    std::vector<uint64_t>& versions = window.sectors[i].versions;
    if (versions.size() == 1) unflushed_.emplace_back(number, static_cast<uint32_t>(i));
    versions.push_back(hash_sector(&window.content[i * kSector]));
  }
}

void ModelDisk::write(GuestOffset offset, ConstBytes data) {
  Window& window = window_at({offset, data.size()});
  const uint64_t begin = offset - window.range.begin;
  std::copy(data.begin(), data.end(), window.content.begin() + static_cast<ptrdiff_t>(begin));
  add_versions(window, begin, begin + data.size());
}

void ModelDisk::zero(GuestRange range) {
  if (range.empty()) return;
  Window& window = window_at(range);
  const uint64_t begin = range.begin - window.range.begin;
  std::fill_n(window.content.begin() + static_cast<ptrdiff_t>(begin), range.length, std::byte{0});
  add_versions(window, begin, begin + range.length);
}

void ModelDisk::grow(uint64_t disk_size, uint64_t window) {
  const GuestRange gained{GuestOffset(disk_size_), std::min(window, disk_size - disk_size_)};
  disk_size_ = disk_size;
  windows_.push_back(gained);
  content_.push_back({gained, std::vector<std::byte>(gained.length), std::vector<Sector>(gained.length / kSector)});
  Window& added = content_.back();
  for (size_t i = 0; i < added.sectors.size(); ++i)
    added.sectors[i].versions = {hash_sector(&added.content[i * kSector])};
}

void ModelDisk::flushed() {
  for (const auto& [window, sector] : unflushed_) {
    std::vector<uint64_t>& versions = content_[window].sectors[sector].versions;
    versions = {versions.back()};
  }
  unflushed_.clear();
}

template <class Accept>
std::string ModelDisk::find_wrong(Disk& disk, Accept accept) const {
  const uint64_t size = disk.size();
  if (size != disk_size_ && size != least_size_)
    return fmt::format("the disk has {} bytes, not {} or {}", size, disk_size_, least_size_);
  for (size_t w = 0; w < content_.size(); ++w) {
    const Window& window = content_[w];
    if (window.range.end().bytes() > size) continue;  // a growth that did not survive
    Buffer buffer(window.range.length);
    if (Result<> read = disk.read(window.range.begin, buffer.bytes()); !read)
      return fmt::format("read {:#x}: {}", window.range.begin.bytes(), read.error().text());
    for (size_t i = 0; i < window.sectors.size(); ++i) {
      const std::byte* found = buffer.data() + i * kSector;
      if (accept(w, i, found)) continue;
      return fmt::format(
          "sector at guest offset {:#x} reads as none of its {} versions: {:02x} {:02x} {:02x} {:02x}…{}",
          window.range.begin.bytes() + i * kSector, window.sectors[i].versions.size(), std::to_integer<int>(found[0]),
          std::to_integer<int>(found[1]), std::to_integer<int>(found[2]), std::to_integer<int>(found[3]),
          is_zero({found, kSector}) ? " (zeros)" : "");
    }
  }
  return {};
}

std::string ModelDisk::compare(Disk& disk) const {
  return find_wrong(disk, [&](size_t window, size_t sector, const std::byte* found) {
    const std::vector<uint64_t>& versions = content_[window].sectors[sector].versions;
    return std::find(versions.begin(), versions.end(), hash_sector(found)) != versions.end();
  });
}

std::string ModelDisk::compare_exactly(Disk& disk) const {
  return find_wrong(disk, [&](size_t window, size_t sector, const std::byte* found) {
    return std::memcmp(found, &content_[window].content[sector * kSector], kSector) == 0;
  });
}

std::string ModelDisk::adopt(Disk& disk) {
  std::string wrong = compare(disk);
  if (!wrong.empty()) return wrong;
  for (Window& window : content_) {
    if (window.range.end().bytes() > disk.size()) continue;
    const std::vector<std::byte> before = window.content;
    if (Result<> read = disk.read(window.range.begin, window.content); !read) return read.error().text();
    for (size_t i = 0; i < window.sectors.size(); ++i)
      if (std::memcmp(&before[i * kSector], &window.content[i * kSector], kSector) != 0)
        add_versions(window, i * kSector, (i + 1) * kSector);
  }
  return {};
}

std::string ModelDisk::settle(Disk& disk) {
  std::string wrong = adopt(disk);
  if (!wrong.empty()) return wrong;
  if (disk.size() != disk_size_) not_grown(disk.size());
  least_size_ = disk_size_;
  flushed();
  return {};
}

void ModelDisk::not_grown(uint64_t disk_size) {
  windows_.pop_back();
  content_.pop_back();
  disk_size_ = disk_size;
  std::erase_if(unflushed_, [&](const auto& sector) { return sector.first >= content_.size(); });
}

Result<> random_request(Disk& disk, ModelDisk& model, const Workload& workload, Rng& rng, std::string& what) {
  if (rng.one_in(workload.flush_one_in)) {
    what = "flush";
    Result<> result = disk.flush();
    if (result) model.flushed();
    return result;
  }

  if (workload.growth && rng.one_in(30)) {
    const uint64_t size =
        model.disk_size() + 512 * rng.between(1, workload.cluster_size / 16 * workload.cluster_size / 512);
    what = fmt::format("grow from {:#x} to {:#x}", model.disk_size(), size);
    model.grow(size, workload.cluster_size * 2);
    Result<> result = disk.resize(size);
    if (result) model.grown();
    if (result || result.error().code() != ErrorCode::unsupported || disk.info().format != "fvd") return result;
    model.not_grown(disk.size());  // there is no room for so long a table
    return {};
  }

  // Small, a few clusters, or anything; sector aligned more often than not.
  const std::vector<GuestRange>& windows = model.windows();
  const GuestRange window = windows[rng.below(windows.size())];
  const uint64_t longest = rng.one_in(4) ? window.length : rng.one_in(2) ? workload.cluster_size * 2 : 4096;
  uint64_t begin = rng.below(window.length);
  uint64_t length = rng.between(1, std::min(longest, window.length - begin));
  switch (rng.below(4)) {
    case 0:
      break;
    case 1: {  // whole clusters, if the window begins with one
      const uint64_t unit = workload.subclusters && rng.one_in(2) ? workload.cluster_size / 32 : workload.cluster_size;
      begin = round_down(begin, unit);
      length = std::min(round_up(length, unit), window.length - begin);
      break;
    }
    default:
      begin = round_down(begin, 512);
      length = std::min(round_up(length, 512), window.length - begin);
  }
  const GuestRange range{window.begin + begin, length};

  const uint64_t kind = rng.below(10);
  if (kind == 0 && workload.zeroing) {
    const Zeroing zeroing = rng.one_in(2) ? Zeroing::keep_allocation : Zeroing::may_free;
    what = fmt::format("zero {:#x}+{:#x} {}", range.begin.bytes(), length,
                       zeroing == Zeroing::keep_allocation ? "keep" : "free");
    model.zero(range);
    return disk.write_zeroes(range, zeroing);
  }
  if (kind <= 2 && workload.discards) {
    what = fmt::format("discard {:#x}+{:#x}", range.begin.bytes(), length);
    model.zero(discarded(range, disk.info(), model.disk_size()));
    return disk.discard(range);
  }
  if (kind == 3 && workload.populate && rng.one_in(3)) {
    const Holes holes = rng.one_in(2) ? Holes::fill : Holes::keep;
    what = fmt::format("populate {:#x}+{:#x}{}", range.begin.bytes(), length, holes == Holes::keep ? " data" : "");
    return disk.populate(range, holes);
  }
  const uint64_t seed = rng.next();
  what = fmt::format("write {:#x}+{:#x} #{:x}", range.begin.bytes(), length, seed & 0xffff);
  std::vector<std::byte> data = workload.loose && seed % 4 != 0 ? loose_pattern(length, seed) : pattern(length, seed);
  if (workload.zeros && rng.one_in(3)) {
    const uint64_t from = rng.one_in(2) ? 0 : rng.below(length);
    const uint64_t to = rng.one_in(2) ? length : rng.between(from, length);
    std::fill(data.begin() + static_cast<ptrdiff_t>(from), data.begin() + static_cast<ptrdiff_t>(to), std::byte{0});
    what += fmt::format(", {:#x} to {:#x} of it zeros", from, to);
  }
  model.write(range.begin, data);
  return disk.write(range.begin, data);
}

std::vector<GuestRange> windows_for(uint64_t disk_size, uint64_t cluster_size, uint64_t clusters_per_window,
                                    uint64_t coverage) {
  if (coverage == 0) coverage = cluster_size / 8 * cluster_size;
  const uint64_t length = clusters_per_window * cluster_size;
  std::vector<GuestRange> windows;
  const auto add = [&](uint64_t begin, uint64_t end) {
    begin = std::max(begin, windows.empty() ? 0 : windows.back().end().bytes());
    end = std::min(end, disk_size);
    if (begin < end) windows.push_back({GuestOffset(begin), end - begin});
  };
  add(0, length);
  if (coverage > length / 2 && coverage < disk_size) add(coverage - length / 2, coverage + length / 2);
  if (disk_size > length) add(round_down(disk_size - length, 512), disk_size);
  return windows;
}

}  // namespace imgfuse::test
