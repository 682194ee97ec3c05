// Disks for the tests of mirrors, and a disk that says where it is.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <string>
#include <thread>

#include "disks.h"
#include "layer/forwarding.h"

namespace imgfuse::test {

/// Calls `at` before and after each read, write and map.
class HookedDisk final : public layer::Forwarding {
 public:
  explicit HookedDisk(Disk& below) : Forwarding(below) {}
  std::function<void()> at = [] {};

 private:
  template <class Call>
  auto within(Call call) {
    at();
    auto result = call();
    at();
    return result;
  }
  Result<> do_read(GuestOffset offset, Bytes out) override {
    return within([&] { return below().read(offset, out); });
  }
  Result<> do_write(GuestOffset offset, ConstBytes data) override {
    return within([&] { return below().write(offset, data); });
  }
  Result<> do_write_zeroes(GuestRange range, Zeroing zeroing) override {
    return within([&] { return below().write_zeroes(range, zeroing); });
  }
  Result<std::vector<Extent>> do_map(GuestRange range, size_t max_extents) override {
    return within([&] { return below().map(range, max_extents); });
  }
};

/// A writable kind of image: what the tests of pairs go through.
struct Kind {
  const char* name;
  std::function<JobDisk(uint64_t size)> make;
};

inline const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all = {
      {"raw", raw_disk},
      {"qcow2, 4k", [](uint64_t size) { return qcow2_disk({.size = size, .cluster_size = 4096}); }},
      {"qcow2, 64k", [](uint64_t size) { return qcow2_disk({.size = size, .cluster_size = 65536}); }},
      {"qcow2, 64k subclusters",
       [](uint64_t size) { return qcow2_disk({.size = size, .cluster_size = 65536, .extended_l2 = true}); }},
      {"qed, 64k", [](uint64_t size) { return disk_of(make_qed({.size = size})); }},
      {"fvd", [](uint64_t size) { return disk_of(make_fvd({.size = size})); }},
      {"fvd, 48k chunks", [](uint64_t size) { return disk_of(FvdKind::image({.size = size, .cluster_size = 49152})); }},
      {"qcow2, 1M", [](uint64_t size) { return qcow2_disk({.size = size, .cluster_size = 1 << 20}); }},
  };
  return all;
}

/// One request as a guest makes it, of any kind and length.
inline Result<> guest_request(Disk& disk, Rng& rng) {
  const uint64_t length = std::min(disk.size(), (uint64_t{1} << rng.between(9, 19)) - 512 * rng.below(2));
  const GuestOffset offset(rng.below((disk.size() - length) / 512 + 1) * 512);
  switch (rng.below(6)) {
    case 0:
      return disk.write_zeroes({offset, length}, Zeroing::may_free);
    case 1:
      return disk.discard({offset, length});
    default:
      return disk.write(offset, pattern(length, rng.next()));
  }
}

/// A guest at work in threads of its own; each has a part of the disk, so that it knows what must be in it.
class Guest {
 public:
  explicit Guest(Disk& disk, unsigned threads = 2) : disk_(disk), part_(disk.size() / threads) {
    for (unsigned i = 0; i < threads; ++i) threads_.emplace_back([this, i] { work(i); });
  }
  ~Guest() { stop(); }
  void stop() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }
  uint64_t requests() const { return requests_; }
  uint64_t wrong() const { return wrong_; }

 private:
  void work(unsigned number) {
    Rng rng(base_seed() + number);
    std::vector<std::byte> model(part_);
    const GuestOffset begin(number * part_);
    if (!disk_.read(begin, model)) ++wrong_;
    while (!stop_) {
      const uint64_t length = 512 * rng.between(1, 40);
      const uint64_t at = 512 * rng.below((part_ - length) / 512 + 1);
      const auto there = model.begin() + static_cast<long>(at);
      if (rng.one_in(3)) {
        std::vector<std::byte> seen(length);
        if (!disk_.read(begin + at, seen) || !std::equal(seen.begin(), seen.end(), there)) ++wrong_;
      } else if (rng.one_in(5)) {
        if (!disk_.write_zeroes({begin + at, length}, Zeroing::may_free)) ++wrong_;
        std::fill(there, there + static_cast<long>(length), std::byte{0});
      } else {
        const auto bytes = pattern(length, rng.next());
        if (!disk_.write(begin + at, bytes)) ++wrong_;
        std::copy(bytes.begin(), bytes.end(), there);
      }
      if (rng.one_in(50) && !disk_.flush()) ++wrong_;
      ++requests_;
    }
  }

  Disk& disk_;
  const uint64_t part_;
  std::atomic<bool> stop_ = false;
  std::atomic<uint64_t> requests_ = 0;
  std::atomic<uint64_t> wrong_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace imgfuse::test
