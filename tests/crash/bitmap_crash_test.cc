// Power cuts while an image with dirty bitmaps is opened, written and closed: a bitmap that a crash leaves valid says
// everything that differs from the disk of when it was added.
#include <doctest/doctest.h>

#include <algorithm>
#include <future>
#include <thread>

#include "format/raw/raw.h"
#include "imgfuse/bitmaps.h"
#include "imgfuse/jobs.h"
#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/order_storage.h"
#include "support/qcow2_view.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kSize = 2_MiB + 512;
constexpr uint64_t kGranule = 4096;

using Content = std::vector<std::byte>;

/// The first granule that differs from `then` and that the bitmap has as clean; nothing if there is none.
std::optional<uint64_t> find_missed(Disk& disk, const std::string& bitmap, const Content& then) {
  const Content now = read_all(disk, GuestOffset(0), kSize);
  std::vector<bool> dirty(kSize / kGranule + 1);
  for (const GuestRange range : must(disk.bitmaps()->changed(bitmap, {GuestOffset(0), kSize})))
    for (uint64_t at = range.begin.bytes() / kGranule; at * kGranule < range.end().bytes(); ++at) dirty[at] = true;
  for (uint64_t at = 0; at < kSize; ++at)
    if (now[at] != then[at] && !dirty[at / kGranule]) return at / kGranule;
  return std::nullopt;
}

/// An image with some data, the content that its bitmaps start from, and some more data.
struct Beginning {
  MemImage image;
  Content then;
};

Beginning begin(uint32_t cluster_size) {
  auto storage = std::make_shared<MemStorage>(make_qcow2({.size = kSize, .cluster_size = cluster_size}));
  auto disk = must(open_qcow2(storage));
  must(disk->write(GuestOffset(0), pattern(300000, 1)));
  must(disk->bitmaps()->add("kept", kGranule));
  must(disk->bitmaps()->add("cleared", kGranule));
  must(disk->bitmaps()->add("removed", 512));
  Beginning beginning{{}, read_all(*disk, GuestOffset(0), kSize)};
  must(disk->write(GuestOffset(1_MiB), pattern(70000, 2)));
  must(disk->close());
  beginning.image = storage->image();
  return beginning;
}

class BitmapCrash {
 public:
  BitmapCrash(uint32_t cluster_size, uint64_t seed) : rng_(seed), beginning_(begin(cluster_size)) {}

  /// How a session clears a bitmap; one with nothing only opens and closes.
  enum class Clearing { nothing, asked, by_backup };
  /// Looks at crashed images after every call.
  uint64_t session(Clearing clearing) {
    auto storage = std::make_shared<CrashStorage>(beginning_.image);
    storage->set_observer([&] {
      if (failed_) return;
      std::async(std::launch::async, [&] {
        for (const CrashMode mode : kCrashModes) look(storage->crash(mode, rng_));
      }).get();
    });
    auto disk = with_jobs(must(open_qcow2(std::make_shared<OrderStorage>(storage, beginning_.image))),
                          [](const std::string&, const auto&) {
                            MemImage image;
                            image.resize(kSize);
                            return Result<JobTarget>({must(raw::open(std::make_shared<MemStorage>(image), {})), false});
                          });
    if (clearing != Clearing::nothing) change(*disk, clearing);
    must(disk->close());
    storage->set_observer({});
    look(storage->image());
    CHECK(valid_at_end_ == 3);
    CHECK(check_image(storage->image()).clean());
    return states_;
  }

 private:
  void change(Disk& disk, Clearing clearing) {
    for (int i = 0; i < 6; ++i) {
      must(disk.write(GuestOffset(rng_.below(kSize - 9000)), pattern(rng_.between(1, 9000), rng_.next())));
      must(disk.discard({GuestOffset(rng_.below(1_MiB)), 200000}));
      if (i == 2) {
        if (clearing == Clearing::asked) must(disk.bitmaps()->clear("cleared"));
        if (clearing == Clearing::by_backup) back_up(*disk.jobs());
        cleared_ = read_all(disk, GuestOffset(0), kSize);
        must(disk.bitmaps()->remove("removed"));
        must(disk.bitmaps()->add("new", 65536));
        must(disk.flush());
      }
    }
  }

  static void back_up(Jobs& jobs) {
    must(jobs.start({.target = "target", .kind = JobKind::backup, .bitmap = "cleared"}));
    while (!is_over(jobs.list().back().state)) std::this_thread::yield();
    CHECK(jobs.list().back().state == JobState::finished);
  }

  /// What a crash left opens, is no corruption, and has no bitmap that is valid and wrong.
  void look(const MemImage& crashed) {
    if (failed_) return;
    ++states_;
    require(Qcow2View::parse(crashed)->find_corruption());
    if (states_ % 4 == 0) require(check_image(crashed).corruptions == 0 ? "" : "qcow2::check finds corruptions");
    auto disk = must(open_qcow2(std::make_shared<MemStorage>(crashed)));
    valid_at_end_ = 0;
    for (const BitmapInfo& bitmap : disk->bitmaps()->list()) {
      if (bitmap.in_use) continue;
      ++valid_at_end_;
      const bool anew = bitmap.name == "new" || (bitmap.name == "cleared" && is_after(*disk));
      if (find_missed(*disk, bitmap.name, anew ? cleared_ : beginning_.then))
        require(bitmap.name + " is valid and lacks what has changed");
    }
    must(disk->close());
    if (rng_.one_in(8)) reopened(crashed);
  }

  /// The session has been stored: only then there is the new bitmap.
  static bool is_after(Disk& disk) {
    const auto list = disk.bitmaps()->list();
    return std::any_of(list.begin(), list.end(), [](const BitmapInfo& bitmap) { return bitmap.name == "new"; });
  }

  /// Another writer keeps what is valid and lets go of what is not.
  void reopened(const MemImage& crashed) {
    auto storage = std::make_shared<MemStorage>(crashed);
    auto disk = must(open_qcow2(std::make_shared<OrderStorage>(storage)));
    std::vector<std::string> lost;
    for (const BitmapInfo& bitmap : disk->bitmaps()->list())
      if (bitmap.in_use) lost.push_back(bitmap.name);
    must(disk->write(GuestOffset(700000), pattern(512, 9)));
    for (const std::string& name : lost) must(disk->bitmaps()->remove(name));
    must(disk->close());
    require(Qcow2View::parse(storage->image())->find_corruption());
    auto reader = must(open_qcow2(std::make_shared<MemStorage>(storage->image()), {.read_only = true}));
    for (const BitmapInfo& bitmap : reader->bitmaps()->list())
      if (bitmap.in_use) require(bitmap.name + " was not let go");
    must(reader->close());
  }

  void require(const std::string& wrong) {
    if (wrong.empty() || failed_) return;
    failed_ = true;
    FAIL_CHECK("state " << states_ << ": " << wrong);
  }

  Rng rng_;
  const Beginning beginning_;
  Content cleared_;
  uint64_t states_ = 0;
  size_t valid_at_end_ = 0;
  bool failed_ = false;
};

TEST_CASE("qcow2: after a crash at any moment no dirty bitmap is valid and wrong") {
  uint64_t states = 0;
  for (const uint32_t cluster_size : {512u, 4096u, 65536u})
    for (const auto clearing :
         {BitmapCrash::Clearing::nothing, BitmapCrash::Clearing::asked, BitmapCrash::Clearing::by_backup}) {
      if (clearing == BitmapCrash::Clearing::by_backup && cluster_size != 4096) continue;  // it takes long
      INFO("IMG_SEED=" << base_seed() << ", cluster size " << cluster_size << ", " << static_cast<int>(clearing));
      states += BitmapCrash(cluster_size, base_seed()).session(clearing);
    }
  MESSAGE(states << " crash states");
  CHECK(states > 300);
}

}  // namespace
}  // namespace imgfuse::test
