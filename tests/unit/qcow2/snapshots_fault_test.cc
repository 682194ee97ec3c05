// Snapshot operations while the host fails, while the power fails after any write, and while others write.
#include <doctest/doctest.h>

#include <functional>
#include <string_view>

#include "base/log.h"
#include "imgfuse/snapshots.h"
#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/fault_storage.h"
#include "support/gate_storage.h"
#include "support/order_storage.h"
#include "support/qcow2_view.h"

namespace imgfuse::test {
namespace {

struct QuietLog {
  QuietLog() {
    set_log_sink([](LogLevel, const std::string&) {});
  }
} const quiet_log;

/// What the disk and its snapshots read as: states are told apart by their first clusters.
constexpr uint64_t kShown = 16;

struct Operation {
  std::string name;
  std::function<Result<>(Snapshots&)> run;
};

const Operation kOperations[] = {
    {"create",
     [](Snapshots& s) -> Result<> {
       IMG_TRY(s.create("third"));
       return {};
     }},
    {"apply", [](Snapshots& s) { return s.apply("first"); }},
    {"remove", [](Snapshots& s) { return s.remove("first"); }},
};

/// A disk with two snapshots, of different sizes where the version allows it, with data and zero clusters in each.
struct Situation {
  uint64_t cluster;
  MemImage image;

  explicit Situation(const Qcow2Spec& spec) : cluster(spec.cluster_size) {
    WatchedDisk disk = open_watched(make_qcow2(spec));
    const auto write = [&](uint64_t at, uint64_t clusters, uint64_t seed) {
      must(disk->write(GuestOffset(at * cluster), pattern(clusters * cluster, seed)));
    };
    write(0, 12, 1);
    write(spec.size / cluster - 2, 2, 2);
    must(disk->snapshots()->create("first"));
    write(4, 4, 3);
    if (spec.version > 2) must(disk->write_zeroes({GuestOffset(9 * cluster), cluster}, Zeroing::keep_allocation));
    if (spec.version > 2) must(disk->resize(spec.size * 3));
    must(disk->snapshots()->create("second"));
    write(6, 8, 4);
    must(disk->discard({GuestOffset(0), 2 * cluster}));
    must(disk->close());
    image = disk.memory->image();
  }
};

/// Everything that can be seen of an image: sizes, names, content.
std::string seen(const MemImage& image, uint64_t cluster) {
  const auto describe = [&](Disk& disk) {
    size_t hash = 0;
    for (const uint64_t at : {uint64_t{0}, disk.size() - kShown * cluster}) {
      const auto bytes = read_all(disk, GuestOffset(at), kShown * cluster);
      hash = hash * 31 + std::hash<std::string_view>()({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    }
    return fmt::format("{} bytes, {:x}", disk.size(), hash);
  };
  auto disk = must(open_qcow2(std::make_shared<MemStorage>(image), {.read_only = true}));
  std::string text = describe(*disk);
  for (const SnapshotInfo& info : must(disk->snapshots()->list())) {
    auto then = must(disk->snapshots()->open(info.id));
    text += fmt::format("; {} {}: {}", info.id, info.name, describe(*then));
    must(then->close());
  }
  must(disk->close());
  return text;
}

/// Sound, flags included; leaks are let pass.
std::string wrong_with(const MemImage& image) {
  const std::optional<Qcow2View> view = Qcow2View::parse(image);
  if (!view) return "no qcow2 image";
  if (const std::string wrong = view->find_corruption(); !wrong.empty()) return wrong;
  const CheckReport report = check_image(image);
  return report.corruptions + report.check_errors > 0 ? "check finds corruptions" : "";
}

const Qcow2Spec kSpecs[] = {
    {.size = 200_KiB, .cluster_size = 512, .refcount_bits = 4},
    {.size = 200_KiB, .cluster_size = 512, .refcount_bits = 64},
    {.size = 1_MiB, .cluster_size = 4096, .refcount_bits = 8},
    {.size = 1_MiB, .cluster_size = 4096, .version = 2},
    {.size = 2_MiB, .cluster_size = 65536, .refcount_bits = 32},
    {.size = 1_MiB, .cluster_size = 16384, .extended_l2 = true},
};

TEST_CASE("qcow2 snapshots: a crash after any write leaves the state before or the state after, and leaks at most") {
  uint64_t states = 0;
  for (const Qcow2Spec& spec : kSpecs) {
    CAPTURE(spec.cluster_size);
    CAPTURE(spec.refcount_bits);
    CAPTURE(spec.version);
    const Situation situation(spec);
    const std::string before = seen(situation.image, situation.cluster);
    for (const Operation& operation : kOperations) {
      CAPTURE(operation.name);
      auto crash = std::make_shared<CrashStorage>(situation.image);
      std::vector<MemImage> crashed;
      Rng rng(spec.cluster_size);
      crash->set_observer([&] {
        crashed.push_back(crash->crash(CrashMode::all, rng));
        if (crash->pending() > 0) crashed.push_back(crash->crash(CrashMode::random, rng));
        if (crash->pending() > 0) crashed.push_back(crash->crash(CrashMode::torn, rng));
      });
      auto disk = must(open_qcow2(std::make_shared<OrderStorage>(crash, situation.image)));

      must(operation.run(*disk->snapshots()));

      const size_t while_running = crashed.size();
      must(disk->close());
      crash->set_observer({});
      const std::string after = seen(crash->image(), situation.cluster);
      CHECK(check_image(crash->image()).leaks == 0);
      bool switched = false;
      for (size_t i = 0; i < crashed.size(); ++i) {
        ++states;
        REQUIRE(wrong_with(crashed[i]) == "");
        // A snapshot's date differs from run to run, but not within one.
        const std::string now = seen(crashed[i], situation.cluster);
        switched |= now == after;
        if (i >= while_running) {
          CHECK(now == after);
        } else {
          CHECK((now == before || now == after));
        }
      }
      CHECK(switched);
    }
  }
  MESSAGE(states << " crash states");
}

TEST_CASE("qcow2 snapshots: an operation may fail at any call") {
  struct Kind {
    const char* name;
    ErrorCode code;
    Fault fault;
  };
  const Kind kinds[] = {
      {"one I/O error", ErrorCode::io, {}},
      {"I/O errors from then on", ErrorCode::io, {.later = true}},
      {"a torn write", ErrorCode::io, {.calls = Call::write | Call::zero, .torn = true}},
      {"no space", ErrorCode::no_space, {.calls = Call::write | Call::zero | Call::allocate}},
      {"a failed flush", ErrorCode::io, {.calls = Call::flush}},
  };
  const Situation situation({.size = 200_KiB, .cluster_size = 512, .refcount_bits = 16});
  const std::string before = seen(situation.image, situation.cluster);
  for (const Operation& operation : kOperations)
    for (const Kind& kind : kinds) {
      CAPTURE(operation.name);
      CAPTURE(kind.name);
      for (uint64_t n = 1;; n += fault_step()) {
        CAPTURE(n);
        REQUIRE(n < 2000);
        auto crash = std::make_shared<CrashStorage>(situation.image);
        auto faults = std::make_shared<FaultStorage>(crash);
        auto disk = must(open_qcow2(std::make_shared<OrderStorage>(faults, situation.image)));
        Rng rng(n);

        faults->fail_call(n, kind.code, kind.fault);
        const Result<> result = operation.run(*disk->snapshots());
        const bool fired = faults->fired();
        faults->heal();

        if (!fired) REQUIRE(result);
        const bool listed = must(disk->snapshots()->list()).size() == 2;
        if (!result) CHECK(listed);
        for (const CrashMode mode : {CrashMode::none, CrashMode::all, CrashMode::torn}) {
          const MemImage crashed = crash->crash(mode, rng);
          REQUIRE(wrong_with(crashed) == "");
        }
        // Either it goes on, and what failed changed nothing, or it refuses every change.
        if (disk->flush()) {
          if (!result) CHECK(seen(crash->image(), situation.cluster) == before);
          const Result<> again = operation.run(*disk->snapshots());
          CHECK(again.has_value() == !(result && operation.name == "remove"));
          CHECK(disk->write(GuestOffset(0), pattern(3 * situation.cluster, n)));
          CHECK(disk->close());
          REQUIRE(wrong_with(crash->image()) == "");
          CHECK(check_image(crash->image()).leaks == 0);
        } else {
          CHECK(fired);
          CHECK_FALSE(operation.run(*disk->snapshots()));
          CHECK_FALSE(disk->write(GuestOffset(0), pattern(512)));
          CHECK_FALSE(disk->close());
          REQUIRE(wrong_with(crash->crash(CrashMode::torn, rng)) == "");
        }
        if (!fired) break;
      }
    }
}

/// A disk with a gate in front of its watched storage.
struct GatedDisk {
  GatedDisk() {
    memory = std::make_shared<MemStorage>(make_qcow2({.size = 64_MiB}));
    gates = std::make_shared<GateStorage>(std::make_shared<OrderStorage>(memory));
    disk = must(open_qcow2(gates));
    must(disk->write(GuestOffset(0), pattern(1_MiB, 1)));
    must(disk->flush());
  }
  void close() {
    must(disk->close());
    CHECK(wrong_with(memory->image()) == "");
    CHECK(check_image(memory->image()).leaks == 0);
  }
  std::shared_ptr<MemStorage> memory;
  std::shared_ptr<GateStorage> gates;
  std::unique_ptr<Disk> disk;
};

TEST_CASE("qcow2 snapshots: a write in flight is in the snapshot that waits for it, later ones are not") {
  for (const uint64_t at : {uint64_t{0}, uint64_t{2_MiB}}) {  // in place, and to a new cluster
    GatedDisk d;
    const auto gate = d.gates->hold(Call::write, Point::before, [](HostRange range) { return range.length == 3000; });
    auto write = in_background([&] { return d.disk->write(GuestOffset(at), pattern(3000, 2)); });
    gate->wait_for_arrival();

    auto create = in_background([&] { return d.disk->snapshots()->create("now"); });
    CHECK(waits(create));
    auto later = in_background([&] { return d.disk->write(GuestOffset(at), pattern(3000, 3)); });
    CHECK(waits(later));

    gate->open();
    must(write.get());
    must(create.get());
    must(later.get());
    auto then = must(d.disk->snapshots()->open("now"));
    CHECK(read_all(*then, GuestOffset(at), 3000) == pattern(3000, 2));
    CHECK(read_all(*d.disk, GuestOffset(at), 3000) == pattern(3000, 3));
    must(then->close());
    d.close();
  }
}

TEST_CASE("qcow2 snapshots: requests wait for an operation, and flushes do not disturb it") {
  for (const Operation& operation : kOperations) {
    CAPTURE(operation.name);
    GatedDisk d;
    must(d.disk->snapshots()->create("first"));
    must(d.disk->write(GuestOffset(512_KiB), pattern(1_MiB, 2)));
    const auto gate =
        d.gates->hold(Call::write, Point::before, [](HostRange range) { return range.begin.bytes() == 24; });
    auto run = in_background([&] { return operation.run(*d.disk->snapshots()); });
    gate->wait_for_arrival();

    auto read = in_background([&] { return read_all(*d.disk, GuestOffset(512_KiB), 4096); });
    auto write = in_background([&] { return d.disk->write(GuestOffset(1_MiB), pattern(4096, 3)); });
    CHECK(waits(read));
    CHECK(waits(write));
    must(d.disk->flush());

    gate->open();
    must(run.get());
    must(write.get());
    CHECK(read.get() == (operation.name == "apply"
                             ? read_all(*must(d.disk->snapshots()->open("first")), GuestOffset(512_KiB), 4096)
                             : pattern(4096, 2)));
    CHECK(read_all(*d.disk, GuestOffset(1_MiB), 4096) == pattern(4096, 3));
    d.close();
  }
}

}  // namespace
}  // namespace imgfuse::test
