#include "faults.h"

#include <doctest/doctest.h>

#include "base/log.h"
#include "support/fault_storage.h"
#include "support/image_view.h"
#include "support/order_storage.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kCluster = Situation::kCluster;

/// Latched disks say so in the log, thousands of times.
struct QuietLog {
  QuietLog() {
    set_log_sink([](LogLevel, const std::string&) {});
  }
} const quiet_log;

struct FaultKind {
  std::string name;
  ErrorCode code;
  Fault fault;
};
const FaultKind kFaultKinds[] = {
    {"one I/O error", ErrorCode::io, {}},
    {"I/O errors from then on", ErrorCode::io, {.later = true}},
    {"a torn write", ErrorCode::io, {.calls = Call::write | Call::zero, .torn = true}},
    {"no space for one call", ErrorCode::no_space, {.calls = Call::write | Call::zero | Call::allocate}},
    {"a failed flush", ErrorCode::io, {.calls = Call::flush}},
};

}  // namespace

Result<> write(Disk& disk, ModelDisk& model, uint64_t offset, ConstBytes data) {
  model.write(GuestOffset(offset), data);
  return disk.write(GuestOffset(offset), data);
}

Result<> write(Disk& disk, ModelDisk& model, uint64_t offset, uint64_t length, uint64_t seed) {
  return write(disk, model, offset, pattern(length, seed));
}

Result<> zero(Disk& disk, ModelDisk& model, GuestRange range, Zeroing zeroing) {
  model.zero(range);
  return disk.write_zeroes(range, zeroing);
}

Result<> flush(Disk& disk, ModelDisk& model) {
  IMG_TRY(disk.flush());
  model.flushed();
  return {};
}

ModelDisk model_of(const Situation& s) {
  const bool small_clusters = ImageView::parse(s.image)->cluster_size() == 512;
  return ModelDisk(s.size,
                   small_clusters ? std::vector<GuestRange>{{GuestOffset(0), 192_KiB}, {GuestOffset(4_MiB), 64_KiB}}
                                  : std::vector<GuestRange>{{GuestOffset(0), 76 * kCluster},
                                                            {GuestOffset(2_MiB - 2 * kCluster), 4 * kCluster}},
                   s.content);
}

namespace {

/// The raw data file reads as the disk does.
void check_raw(Disk& disk, const MemImage& data, const ModelDisk& model) {
  for (const GuestRange window : model.windows()) {
    if (window.end().bytes() > disk.size()) continue;  // a growth that is lost
    std::vector<std::byte> raw(window.length);
    data.read(window.begin.bytes(), raw);
    CHECK(read_all(disk, window.begin, window.length) == raw);
  }
}

}  // namespace

void check_crashed(const CrashStorage& storage, const ModelDisk& model, const Situation& s, Rng& rng,
                   const CrashStorage* data) {
  for (const CrashMode mode : {CrashMode::none, CrashMode::all, CrashMode::torn}) {
    MemImage crashed = storage.crash(mode, rng);
    if (ImageView::parse(crashed)->is_lazy()) crashed = reopened(crashed, {.backing = s.backing});
    CHECK(ImageView::parse(crashed)->find_corruption() == "");
    CHECK(check_image(crashed).corruptions == 0);
    const MemImage crashed_data = data ? data->crash(kCrashModes[rng.below(std::size(kCrashModes))], rng) : MemImage{};
    auto disk = open_image(std::make_shared<MemStorage>(crashed),
                           {.backing = s.backing, .data = std::make_shared<MemStorage>(crashed_data)});
    REQUIRE(disk);
    if (s.raw) check_raw(**disk, crashed_data, model);
    CHECK(model.compare(**disk) == "");
    must((*disk)->close());
  }
}

namespace {

void fail_everywhere(const Situation& situation, const Operation& operation, bool in_data_file) {
  CAPTURE(operation.name);
  CAPTURE(in_data_file);
  for (const FaultKind& kind : kFaultKinds) {
    CAPTURE(kind.name);
    for (uint64_t n = 1;; n += fault_step()) {
      CAPTURE(n);
      REQUIRE(n < 2000);
      Rng rng(n);
      auto crash = std::make_shared<CrashStorage>(situation.image);
      auto image = std::make_shared<FaultStorage>(crash);
      auto ordered = std::make_shared<OrderStorage>(image, situation.image);
      auto data_crash = std::make_shared<CrashStorage>(situation.data.value_or(MemImage{}));
      auto data = std::make_shared<FaultStorage>(data_crash);
      const auto& faults = in_data_file ? data : image;
      ModelDisk model = model_of(situation);
      auto disk = must(open_image(
          ordered,
          {.metadata_cache = 64_KiB, .backing = situation.backing, .compress = situation.compress, .data = data}));

      faults->fail_call(n, kind.code, kind.fault);
      Result<> result = operation.run(*disk, model);
      if (result) result = flush(*disk, model);
      const bool fired = faults->fired();
      faults->heal();
      if (!fired) CHECK(result);
      check_crashed(*crash, model, situation, rng, data_crash.get());
      CHECK(model.compare(*disk) == "");  // reads go on

      // Either it works again, and is consistent, or it refuses every change.
      ModelDisk later = model;
      CHECK(later.adopt(*disk) == "");
      const Result<> again = write(*disk, later, 40 * kCluster, 3 * kCluster, n);
      const Result<> flushed = flush(*disk, later);
      if (again && flushed) {
        check_crashed(*crash, later, situation, rng, data_crash.get());
        CHECK(later.compare_exactly(*disk) == "");
        CHECK(disk->close());
        CHECK(check_image(crash->image()).leaks == 0);
      } else {
        CHECK(fired);
        CHECK_FALSE(flushed);
        CHECK_FALSE(disk->flush());
        CHECK_FALSE(disk->write(GuestOffset(0), pattern(512)));
        CHECK_FALSE(disk->close());
        check_crashed(*crash, later, situation, rng, data_crash.get());
      }
      if (!fired) break;
    }
  }
}

}  // namespace

void fail_everywhere(const Situation& situation, const Operation& operation) {
  fail_everywhere(situation, operation, false);
  if (situation.data) fail_everywhere(situation, operation, true);
}

void fail_closing(const Situation& situation, const Operation& before) {
  CAPTURE(before.name);
  for (uint64_t n = 1;; n += fault_step()) {
    CAPTURE(n);
    auto crash = std::make_shared<CrashStorage>(situation.image);
    auto faults = std::make_shared<FaultStorage>(crash);
    ModelDisk model = model_of(situation);
    auto disk = must(open_image(std::make_shared<OrderStorage>(faults, situation.image), {.metadata_cache = 64_KiB}));
    must(before.run(*disk, model));

    faults->fail_call(n, ErrorCode::io);
    const Result<> closed = disk->close();

    CHECK((closed || faults->fired()));
    if (closed) model.flushed();
    Rng rng(n);
    check_crashed(*crash, model, situation, rng);
    if (!faults->fired()) break;
  }
}

}  // namespace imgfuse::test
