// Changes images at random and sees that they hold what they should. test_random_images.py writes the names of images
// and seeds to its standard input, and compares what this program says with what QEMU says.
#include <doctest/doctest.h>
#include <fmt/format.h>

#include <filesystem>
#include <iostream>
#include <map>
#include <sstream>

#include "base/buffer.h"
#include "imgfuse/bitmaps.h"
#include "imgfuse/open.h"
#include "imgfuse/snapshots.h"
#include "support/model_disk.h"
#include "support/must.h"

namespace imgfuse::test {
namespace {

/// One image: it is opened twice for writing, and read between.
class Exercise {
 public:
  Exercise(std::string path, uint64_t seed, std::optional<std::string> compress)
      : path_(std::move(path)),
        format_(path_.ends_with(".qed") ? "qed" : "qcow2"),
        rng_(seed),
        compress_(std::move(compress)) {}

  /// Leaves what the disk read as before and after in IMAGE.before and IMAGE.after, and what the snapshot held whose id
  /// is returned ("-": there is none) in IMAGE.snapshot.
  std::string run() {
    look();
    disk_content_.save(path_ + ".before");
    for (int i = 0; i < 2; ++i) change(i == 0 ? std::nullopt : compress_);
    const std::map<std::string, MemImage> expected = snapshots_;
    const MemImage content = disk_content_;
    look();
    require(equal(content, disk_content_), "the disk reads otherwise after it was closed");
    require(snapshots_.size() == expected.size(), "there are other snapshots after the disk was closed");
    for (const auto& [id, held] : expected)
      require(snapshots_.contains(id) && equal(snapshots_.at(id), held), "snapshot " + id + " has changed");
    disk_content_.save(path_ + ".after");
    if (snapshots_.empty()) return "-";
    snapshots_.rbegin()->second.save(path_ + ".snapshot");
    return snapshots_.rbegin()->first;
  }

  const std::string& requests() const { return requests_; }

 private:
  void look() {
    auto disk = must(open_disk(path_, {.read_only = true, .format = format_}));
    disk_content_ = content(*disk);
    snapshots_.clear();
    for (const SnapshotInfo& snapshot :
         disk->snapshots() ? must(disk->snapshots()->list()) : std::vector<SnapshotInfo>{}) {
      auto held = must(disk->snapshots()->open(snapshot.id));
      snapshots_[snapshot.id] = content(*held);
      must(held->close());
    }
    must(disk->close());
  }

  void change(const std::optional<std::string>& compress) {
    note(fmt::format("open{}", compress ? ", compress=" + *compress : ""));
    auto disk = must(open_disk(path_, {.format = format_,
                                       .cache = CacheMode::unsafe,
                                       .compress = compress,
                                       .compressed_cache = rng_.one_in(3) ? 0u : 256_KiB,
                                       .metadata_cache = rng_.one_in(2) ? 64_KiB : 1_MiB}));
    const MemImage before = disk_content_;
    const auto bitmaps = disk->bitmaps() ? disk->bitmaps()->list() : std::vector<BitmapInfo>{};
    for (uint64_t bursts = rng_.between(1, 3); bursts > 0; --bursts) {
      make_requests(*disk);
      if (disk->snapshots() && rng_.one_in(2)) change_snapshots(*disk);
      if (rng_.one_in(4)) resize(*disk);
    }
    for (const BitmapInfo& bitmap : bitmaps)
      if (bitmap.recording && !bitmap.in_use) require_recorded(*disk, bitmap.name, before);
    must(disk->close());
  }

  void make_requests(Disk& disk) {
    if (disk.size() == 0) return;
    const DiskInfo info = disk.info();
    ModelDisk model(info.size, {{GuestOffset(0), info.size}}, disk_content_);
    const Workload workload{
        .cluster_size = info.cluster_size, .subclusters = info.subcluster_size != 0, .loose = rng_.one_in(2)};
    for (uint64_t n = rng_.between(1, 12); n > 0; --n) {
      std::string what;
      const Result<> done = random_request(disk, model, workload, rng_, what);
      note(what);
      require(done.has_value(), done ? "" : done.error().text());
    }
    require_nothing(model.compare_exactly(disk));
    disk_content_ = content(disk);
  }

  void change_snapshots(Disk& disk) {
    Snapshots& snapshots = *disk.snapshots();
    if (snapshots_.empty() || rng_.one_in(2)) {
      const auto made = snapshots.create(fmt::format("ours {}", rng_.next()));
      note("create a snapshot");
      if (made)
        snapshots_[made->id] = disk_content_;
      else
        accept(made.error());  // its counts are too narrow
      return;
    }
    const auto chosen = std::next(snapshots_.begin(), static_cast<ptrdiff_t>(rng_.below(snapshots_.size())));
    if (rng_.one_in(2)) {
      note("apply snapshot " + chosen->first);
      if (const Result<> applied = snapshots.apply(chosen->first); applied)
        disk_content_ = chosen->second;
      else
        accept(applied.error());  // the same
    } else {
      note("remove snapshot " + chosen->first);
      must(snapshots.remove(chosen->first));
      snapshots_.erase(chosen);
    }
  }

  void resize(Disk& disk) {
    const uint64_t size = rng_.one_in(2) ? rng_.below(disk.size() / 512 + 1) * 512
                                         : disk.size() + rng_.between(1, disk.info().cluster_size / 512 * 4) * 512;
    note(fmt::format("resize to {:#x}", size));
    if (const Result<> done = disk.resize(size, {.shrink = true}); done)
      disk_content_.resize(size);
    else
      accept(done.error());  // version 2 with snapshots
    require(disk.size() == disk_content_.size(), "the disk has another size than was asked for");
  }

  /// What the bitmap says has changed covers what has.
  void require_recorded(Disk& disk, const std::string& name, const MemImage& before) {
    const uint64_t size = std::min(before.size(), disk.size());
    if (size == 0) return;
    std::vector<std::byte> then(size), now(size);
    before.read(0, then);
    disk_content_.read(0, now);
    for (const GuestRange range : must(disk.bitmaps()->changed(name, {GuestOffset(0), disk.size()}))) {
      const uint64_t begin = std::min(range.begin.bytes(), size);
      const uint64_t end = std::min(range.end().bytes(), size);
      std::copy_n(now.begin() + static_cast<ptrdiff_t>(begin), end - begin,
                  then.begin() + static_cast<ptrdiff_t>(begin));
    }
    require(then == now, "bitmap " + name + " misses a change");
  }

  static MemImage content(Disk& disk) {
    constexpr uint64_t kPiece = 256_KiB;
    MemImage image;
    image.resize(disk.size());
    std::vector<std::byte> piece;
    for (uint64_t at = 0; at < disk.size(); at += kPiece) {
      piece.resize(std::min(kPiece, disk.size() - at));
      must(disk.read(GuestOffset(at), piece));
      if (!is_zero(piece)) image.write(at, piece);
    }
    return image;
  }

  static bool equal(const MemImage& a, const MemImage& b) {
    if (a.size() != b.size()) return false;
    std::vector<std::byte> left(a.size()), right(a.size());
    a.read(0, left);
    b.read(0, right);
    return left == right;
  }

  /// What the image cannot hold is refused, and nothing has changed.
  void accept(const Error& error) {
    note(error.text());
    require(error.code() == ErrorCode::unsupported, error.text());
  }
  void note(const std::string& what) { requests_ += "\n  " + what; }
  void require_nothing(const std::string& wrong) { require(wrong.empty(), wrong); }
  void require(bool ok, const std::string& wrong) {
    if (!ok) FAIL(wrong);
  }

  const std::string path_;
  const std::string format_;
  Rng rng_;
  const std::optional<std::string> compress_;  // whole clusters that are written when it is opened again
  std::string requests_;
  MemImage disk_content_;
  std::map<std::string, MemImage> snapshots_;
};

/// Each line names an image, a seed and a compression ("-": none). The answer is a line too.
TEST_CASE("exercise: images hold what they should") {
  std::string line;
  while (std::getline(std::cin, line)) {
    std::string path, compress;
    uint64_t seed = 0;
    std::istringstream(line) >> path >> seed >> compress;
    Exercise exercise(path, seed, compress == "-" ? std::nullopt : std::optional(compress));
    INFO(path << ", seed " << seed << exercise.requests());
    const std::string snapshot = exercise.run();
    std::cout << "ok " << snapshot << std::endl;
  }
}

}  // namespace
}  // namespace imgfuse::test
