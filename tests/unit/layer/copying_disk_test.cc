// Copy-on-read and prefetching over disks of every format that has backing files, with a clock that the test owns.
#include "layer/copying_disk.h"

#include <doctest/doctest.h>

#include "base/log.h"
#include "support/builders.h"
#include "support/fault_storage.h"
#include "support/gate_storage.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kSize = 4_MiB;

/// Time goes on only while somebody waits, and by as much as he asked for.
class StepClock final : public CopyClock {
 public:
  Milliseconds now() override {
    Lock lock(mutex_);
    now_ += work_;  // whatever lies between two looks takes that long
    return now_;
  }
  void wait(Milliseconds time) override {
    Lock lock(mutex_);
    now_ += time;
    waits_.push_back(time.count());
  }
  void interrupt() override {}
  void set_work(Milliseconds work) {
    Lock lock(mutex_);
    work_ = work;
  }
  std::vector<double> waits() {
    Lock lock(mutex_);
    return waits_;
  }

 private:
  Mutex mutex_;
  Milliseconds now_{0}, work_{0};
  std::vector<double> waits_;
};

MemImage base_content() {
  MemImage base;
  base.write(0, pattern(kSize, 8));
  return base;
}

MemImage overlay(const std::string& format) {
  if (format == "qcow2") return make_qcow2({.size = kSize, .backing = "base.raw"});
  if (format == "qed") return make_qed({.size = kSize, .backing = "base.raw"});
  FvdSpec spec{.size = kSize, .base = true, .base_size = kSize};
  spec.own.block_size = 65536;
  spec.own.compact = format == "fvd, compact";
  spec.own.journal_size = 65536;
  return make_fvd(spec);
}

Result<std::unique_ptr<Disk>> open(std::shared_ptr<Storage> storage, const MemImage& base = base_content()) {
  return open_image(std::move(storage), {.backing = base});
}

struct Copied {
  explicit Copied(const std::string& format)
      : storage(std::make_shared<MemStorage>(overlay(format))), gates(std::make_shared<GateStorage>(storage)) {}
  Copied(const std::string& format, CopyOptions options) : Copied(format) { start(std::move(options)); }
  /// From here on it may be copied at any time.
  void start(CopyOptions options) {
    auto own_clock = std::make_unique<StepClock>();
    clock = own_clock.get();
    disk = std::make_unique<CopyingDisk>(must(open(gates)), std::move(options), std::move(own_clock));
  }
  ~Copied() {
    if (disk) (void)disk->close();
  }
  BackgroundCopy::Progress progress() { return disk->background_copy()->progress(); }
  void wait_for(BackgroundCopy::State state) {
    while (progress().state != state) std::this_thread::yield();
  }
  uint64_t local() {
    uint64_t bytes = 0;
    for (const Extent& extent : must(disk->map({GuestOffset(0), kSize})))
      if (extent.depth == 0) bytes += extent.range.length;
    return bytes;
  }

  std::shared_ptr<MemStorage> storage;
  std::shared_ptr<GateStorage> gates;
  StepClock* clock = nullptr;
  std::unique_ptr<CopyingDisk> disk;
};

CopyOptions on_read() {
  CopyOptions options;
  options.settings.copy_on_read = true;
  return options;
}

CopyOptions everything() {
  CopyOptions options;
  options.everything = true;
  options.settings.start_delay = 0;
  options.settings.throttle_time = 0;
  return options;
}

const std::vector<std::string> kFormats = {"qcow2", "qed", "fvd", "fvd, compact"};

}  // namespace

TEST_CASE("copy-on-read: what is read is in the image soon after, and reads the same") {
  for (const std::string& format : kFormats) {
    CAPTURE(format);
    Copied c(format, on_read());

    CHECK(read_all(*c.disk, GuestOffset(1_MiB + 5), 1000) ==
          read_all(*make_raw_disk(base_content()), GuestOffset(1_MiB + 5), 1000));
    c.disk->wait_idle();

    CHECK(c.local() == 65536);
    CHECK(c.progress().copied_on_read >= 1000);
    CHECK(read_all(*c.disk, GuestOffset(0), kSize) == pattern(kSize, 8));
  }
}

TEST_CASE("copy-on-read: a reader does not wait for the copy, nor for its metadata") {
  for (const std::string& format : kFormats) {
    CAPTURE(format);
    Copied c(format, on_read());
    const auto gate = c.gates->hold(Call::write);
    (void)read_all(*c.disk, GuestOffset(0), 4096);
    gate->wait_for_arrival();

    CHECK(read_all(*c.disk, GuestOffset(2_MiB), 4096) ==
          read_all(*make_raw_disk(base_content()), GuestOffset(2_MiB), 4096));

    CHECK(c.storage->counts().flushes == 0);
    gate->open();
    c.disk->wait_idle();
  }
}

TEST_CASE("copy-on-read: what would be too much at once is read and not copied") {
  CopyOptions options = on_read();
  options.settings.max_outstanding_copy_on_read = 131072;
  Copied c("fvd", options);
  const auto gate = c.gates->hold(Call::write);
  (void)read_all(*c.disk, GuestOffset(0), 65536);
  gate->wait_for_arrival();

  (void)read_all(*c.disk, GuestOffset(1_MiB), 65536);
  (void)read_all(*c.disk, GuestOffset(2_MiB), 65536);

  CHECK(c.progress().skipped_on_read == 65536);
  gate->open();
  c.disk->wait_idle();
  CHECK(c.local() == 131072);
}

TEST_CASE("copy-on-read: a copy that fails is nobody's error, and the base is still there") {
  set_log_sink([](LogLevel, const std::string&) {});
  const auto storage = std::make_shared<MemStorage>(overlay("fvd"));
  const auto faults = std::make_shared<FaultStorage>(storage);
  CopyingDisk disk(must(open(faults)), on_read(), std::make_unique<StepClock>());
  faults->fail_call(1, ErrorCode::no_space, {.calls = Call::write, .later = true});

  (void)read_all(disk, GuestOffset(0), 4096);
  disk.wait_idle();

  CHECK(faults->fired());
  CHECK(must(disk.map({GuestOffset(0), 4096})).front().depth == 1);
  faults->heal();
  (void)read_all(disk, GuestOffset(0), 4096);
  disk.wait_idle();
  CHECK(must(disk.map({GuestOffset(0), 4096})).front().depth == 0);
  must(disk.close());
}

TEST_CASE("prefetch: everything is copied, the progress says so, and the base is done with") {
  for (const std::string& format : kFormats) {
    CAPTURE(format);
    Copied c(format, everything());
    must(c.disk->write(GuestOffset(1_MiB), pattern(4096, 1)));

    c.wait_for(BackgroundCopy::State::finished);

    CHECK(c.progress().done == kSize);
    CHECK(c.progress().total == kSize);
    CHECK(c.local() == kSize);
    std::vector<std::byte> wanted = pattern(kSize, 8);
    const std::vector<std::byte> written = pattern(4096, 1);
    std::copy(written.begin(), written.end(), wanted.begin() + 1_MiB);
    CHECK(read_all(*c.disk, GuestOffset(0), kSize) == wanted);
    must(c.disk->close());
    c.disk.reset();
    if (format == "qcow2" || format == "qed") continue;
    auto alone = must(fvd::open(c.storage, {}));  // which has no way to a base
    CHECK(read_all(*alone, GuestOffset(0), kSize) == wanted);
    must(alone->close());
  }
}

TEST_CASE("prefetch: holes of the base become zeros that take no host space") {
  MemImage base;
  base.write(1_MiB, pattern(65536, 8));
  base.write(3_MiB + 70000, pattern(10, 8));
  base.resize(kSize);
  for (const std::string& format : kFormats) {
    CAPTURE(format);
    const auto storage = std::make_shared<MemStorage>(overlay(format));
    CopyingDisk disk(must(open(storage, base)), everything(), std::make_unique<StepClock>());

    while (disk.background_copy()->progress().state != BackgroundCopy::State::finished) std::this_thread::yield();

    CHECK(storage->counts().bytes_written < 1_MiB);
    for (const Extent& extent : must(disk.map({GuestOffset(0), kSize}))) CHECK(extent.depth == 0);
    std::vector<std::byte> wanted(kSize);
    base.read(0, wanted);
    CHECK(read_all(disk, GuestOffset(0), kSize) == wanted);
    must(disk.close());
  }
}

TEST_CASE("prefetch: begins after its delay, and what is there already is not copied again") {
  CopyOptions options = everything();
  options.settings.start_delay = 7;
  Copied c("fvd", options);

  c.wait_for(BackgroundCopy::State::finished);

  REQUIRE(c.clock->waits().size() == 1);
  CHECK(c.clock->waits()[0] == 7000);
}

TEST_CASE("prefetch: an image that was closed in the middle goes on where it was") {
  const auto storage = std::make_shared<MemStorage>(overlay("fvd"));
  auto first = must(open(storage));
  must(first->populate({GuestOffset(0), 3_MiB}));
  must(first->close());
  storage->counts().reset();

  CopyingDisk second(must(open(storage)), everything(), std::make_unique<StepClock>());
  while (second.background_copy()->progress().state != BackgroundCopy::State::finished) std::this_thread::yield();
  must(second.close());

  CHECK(storage->counts().bytes_written >= 1_MiB);
  CHECK(storage->counts().bytes_written < 1_MiB + 131072);
}

TEST_CASE("prefetch: a slow base makes pauses, whose length chance decides") {
  CopyOptions options = everything();
  options.settings.bytes_per_prefetch = 65536;
  options.settings.throttle_time = 1000;
  options.settings.min_read_throughput = 1 << 20;  // 1 GiB/s
  options.random = [](uint64_t n) { return n == 2 ? 0 : n / 2; };
  const auto storage = std::make_shared<MemStorage>(overlay("fvd"));
  auto own_clock = std::make_unique<StepClock>();
  StepClock* clock = own_clock.get();
  clock->set_work(Milliseconds(60));
  CopyingDisk disk(must(open(storage)), options, std::move(own_clock));
  while (disk.background_copy()->progress().state != BackgroundCopy::State::finished) std::this_thread::yield();

  CHECK(clock->waits().size() >= 10);
  for (const double wait : clock->waits()) CHECK(wait == 501);
  must(disk.close());
}

TEST_CASE("prefetch: a rate is kept") {
  CopyOptions options = everything();
  options.settings.bytes_per_prefetch = 65536;
  options.rate = 65536;
  Copied c("fvd", options);

  c.wait_for(BackgroundCopy::State::finished);

  double waited = 0;
  for (const double wait : c.clock->waits()) waited += wait;
  CHECK(waited == doctest::Approx(63 * 1000));  // 64 pieces
}

TEST_CASE("prefetch: settings that no image should have do no harm") {
  CopyOptions options = everything();
  options.settings.copy_on_read = true;
  options.settings.max_outstanding_copy_on_read = ~uint64_t{0};
  options.settings.bytes_per_prefetch = 0xFFFFFFFF;
  options.settings.average_alpha = 0xFFFFFFFF;
  options.settings.slots = 0;
  options.settings.read_measure_time = options.settings.write_measure_time = 0xFFFFFFFF;
  options.settings.min_read_throughput = options.settings.min_write_throughput = 0xFFFFFFFF;
  options.settings.throttle_time = -5;
  Copied c("fvd", options);

  (void)read_all(*c.disk, GuestOffset(0), kSize);
  c.wait_for(BackgroundCopy::State::finished);

  CHECK(c.local() == kSize);
}

TEST_CASE("prefetch: closing stops it, and keeps what was copied") {
  Copied c("fvd");
  const auto gate = c.gates->hold(Call::write, Point::before, [](HostRange range) { return range.length == 1_MiB; });
  c.start(everything());
  gate->wait_for_arrival();
  auto closing = in_background([&] { return c.disk->close(); });
  CHECK(waits(closing));

  gate->open();
  must(closing.get());

  c.disk.reset();
  auto disk = must(open(c.storage));
  CHECK(must(disk->map({GuestOffset(0), kSize})).front().depth == 0);
  CHECK(read_all(*disk, GuestOffset(0), kSize) == pattern(kSize, 8));
  must(disk->close());
}

TEST_CASE("prefetch: requests of the guest go on beside it") {
  for (const std::string& format : kFormats) {
    CAPTURE(format);
    CopyOptions options = everything();
    options.settings.copy_on_read = true;
    options.settings.bytes_per_prefetch = 65536;
    Copied c(format, options);
    std::vector<std::byte> wanted = pattern(kSize, 8);
    Rng rng(base_seed());
    for (uint64_t i = 0; i < 200; ++i) {
      const uint64_t at = rng.below(kSize - 5000), length = rng.between(1, 5000);
      if (rng.one_in(2)) {
        const std::vector<std::byte> data = pattern(length, i);
        must(c.disk->write(GuestOffset(at), data));
        std::copy(data.begin(), data.end(), wanted.begin() + static_cast<ptrdiff_t>(at));
      } else {
        const auto begin = wanted.begin() + static_cast<ptrdiff_t>(at);
        REQUIRE(read_all(*c.disk, GuestOffset(at), length) ==
                std::vector<std::byte>(begin, begin + static_cast<ptrdiff_t>(length)));
      }
    }
    c.wait_for(BackgroundCopy::State::finished);
    CHECK(read_all(*c.disk, GuestOffset(0), kSize) == wanted);
  }
}

}  // namespace imgfuse::test
