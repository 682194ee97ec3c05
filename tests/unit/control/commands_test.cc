#include "control/commands.h"

#include <doctest/doctest.h>

#include "../fuse/memory_snapshots.h"
#include "control/jobs_json.h"
#include "imgfuse/bitmaps.h"
#include "imgfuse/jobs.h"

namespace imgfuse::control {
namespace {

using fuse::MemoryDisk;
using fuse::SnapshotMemoryDisk;

constexpr uint64_t kSize = 1_MiB;

/// Notes what it is told, in order.
class Notes : public Presenter {
 public:
  std::vector<std::string> taken;
  Result<> settled;

 private:
  Json describe() const override { return {{"image", "/image"}}; }
  Result<> settle() override {
    taken.push_back("settle");
    return settled;
  }
  Result<> replaced() override {
    taken.push_back("replaced");
    return {};
  }
  Result<> resized() override {
    taken.push_back("resized");
    return {};
  }
  void snapshots_changed() override { taken.push_back("snapshots"); }
};

/// Bitmaps that are all set.
class BitmapDisk : public MemoryDisk, private Bitmaps {
 public:
  using MemoryDisk::MemoryDisk;
  Bitmaps* bitmaps() override { return this; }

 private:
  std::vector<BitmapInfo> list() const override { return list_; }
  Result<> add(const std::string& name, uint64_t granularity) override {
    list_.push_back({name, granularity, false, true});
    return {};
  }
  Result<> remove(const std::string& name) override {
    return std::erase_if(list_, [&](const auto& b) { return b.name == name; }) ? Result<>() : missing(name);
  }
  Result<> assign(const std::string& name, const std::vector<GuestRange>&) override { return missing(name); }
  Result<std::vector<GuestRange>> changed(const std::string&, GuestRange range) const override {
    return std::vector<GuestRange>{range};
  }
  Result<> missing(const std::string& name) const { return fail(ErrorCode::not_found, "no bitmap {}", name); }

  std::vector<BitmapInfo> list_;
};

/// Takes orders and notes them.
class JobsDisk : public MemoryDisk, private Jobs {
 public:
  using MemoryDisk::MemoryDisk;
  Jobs* jobs() override { return this; }
  JobOptions options;
  std::vector<std::string> orders;
  std::vector<JobStatus> jobs_;

 private:
  Result<uint64_t> start(const JobOptions& wanted) override {
    options = wanted;
    return 7;
  }
  std::vector<JobStatus> list() const override { return jobs_; }
  Result<> order(const char* name, uint64_t job, uint64_t number = 0) {
    if (job != 7) return fail(ErrorCode::not_found, "there is no job {}", job);
    orders.push_back(fmt::format("{} {}", name, number));
    return {};
  }
  Result<> pause(uint64_t job) override { return order("pause", job); }
  Result<> resume(uint64_t job) override { return order("resume", job); }
  Result<> set_rate(uint64_t job, uint64_t rate) override { return order("set-rate", job, rate); }
  Result<> cancel(uint64_t job) override { return order("cancel", job); }
  Result<> complete(uint64_t job) override { return order("complete", job); }
  Result<> finish(uint64_t job) override { return order("finish", job); }
  void set_hooks(JobHooks) override {}
  void end() override {}
};

template <class D>
struct Asked {
  explicit Asked(uint64_t size = kSize) : disk(size) {}
  Result<Json> operator()(const std::string& command, const Json& arguments = Json::object()) {
    notes.taken.clear();
    return Commands(disk, notes).run({command, arguments, {}});
  }
  using Taken = std::vector<std::string>;
  D disk;
  Notes notes;
};

TEST_CASE("control commands: hello and info") {
  Asked<MemoryDisk> ask;

  CHECK(ask("hello")->at("protocol") == 1);
  const auto info = ask("info");
  REQUIRE(info);
  CHECK(info->at("image") == "/image");
  CHECK(info->at("virtual-size") == kSize);
  CHECK(info->at("read-only") == false);
  CHECK(info->at("snapshots") == false);
  CHECK(ask("info", {{"x", 1}}).error().text() == "there is no argument \"x\"");
  CHECK(ask("nonsense").error().code() == ErrorCode::unsupported);
}

TEST_CASE("control commands: a snapshot is made of what has settled, applied, and deleted") {
  Asked<SnapshotMemoryDisk> ask;
  const std::vector<std::byte> then(100, std::byte{1});
  const std::vector<std::byte> later(200, std::byte{2});
  REQUIRE(ask.disk.write(GuestOffset(0), then));

  const auto made = ask("snapshot-create", {{"name", "monday"}});
  REQUIRE(made);
  CHECK(ask.notes.taken == std::vector<std::string>{"settle", "snapshots"});
  CHECK(made->at("name") == "monday");
  CHECK(made->at("disk-size") == kSize);
  REQUIRE(ask.disk.write(GuestOffset(50), later));
  REQUIRE(ask("snapshot-list"));
  CHECK(ask("snapshot-list")->size() == 1);

  CHECK(ask("snapshot-apply", {{"snapshot", "monday"}}));
  CHECK(ask.notes.taken == std::vector<std::string>{"settle", "replaced"});
  CHECK(ask.disk.content()[60] == std::byte{1});
  CHECK(ask.disk.content()[150] == std::byte{0});
  CHECK(ask("snapshot-delete", {{"snapshot", "1"}}));
  CHECK(ask.notes.taken == std::vector<std::string>{"snapshots"});
  CHECK(ask("snapshot-list")->empty());
}

TEST_CASE("control commands: what cannot settle changes nothing") {
  Asked<SnapshotMemoryDisk> ask;
  REQUIRE(ask("snapshot-create", {{"name", "a"}}));
  ask.notes.settled = fail(ErrorCode::io, "stuck");

  for (const char* command : {"snapshot-create", "snapshot-apply"}) {
    const char* key = command == std::string("snapshot-create") ? "name" : "snapshot";
    CHECK(ask(command, {{key, "a"}}).error().text() == "stuck");
    CHECK(ask.notes.taken == std::vector<std::string>{"settle"});
  }
  CHECK(ask("resize", {{"size", kSize * 2}}).error().text() == "stuck");
  CHECK(ask("snapshot-list")->size() == 1);
  CHECK(ask.disk.size() == kSize);
}

TEST_CASE("control commands: unknown snapshots, missing names, formats without snapshots") {
  Asked<SnapshotMemoryDisk> ask;
  CHECK(ask("snapshot-apply", {{"snapshot", "x"}}).error().code() == ErrorCode::not_found);
  CHECK(ask("snapshot-delete", {{"snapshot", "x"}}).error().code() == ErrorCode::not_found);
  CHECK(ask("snapshot-create").error().text() == "argument \"name\" is missing or empty");
  CHECK(ask("snapshot-create", {{"name", 4}}).error().code() == ErrorCode::invalid);
  Asked<MemoryDisk> plain;
  CHECK(plain("snapshot-list").error().text() == "there are no snapshots in memory images");
  CHECK(plain("bitmap-list").error().text() == "there are no bitmaps in memory images");
}

TEST_CASE("control commands: a snapshot that is open is not deleted, one that was just closed is") {
  Asked<SnapshotMemoryDisk> ask;
  REQUIRE(ask("snapshot-create", {{"name", "a"}}));
  auto open = ask.disk.snapshots()->open("1");
  REQUIRE(open);

  CHECK(ask("snapshot-delete", {{"snapshot", "a"}}).error().code() == ErrorCode::busy);
  std::thread closing([&] {
    (void)(*open)->close();
    open->reset();
  });
  CHECK(ask("snapshot-delete", {{"snapshot", "a"}}));
  closing.join();
}

TEST_CASE("control commands: resize") {
  Asked<MemoryDisk> ask;
  CHECK(ask("resize", {{"size", 2 * kSize}})->at("virtual-size") == 2 * kSize);
  CHECK(ask.notes.taken == std::vector<std::string>{"settle", "resized"});
  CHECK(!ask("resize", {{"size", kSize}}));
  CHECK(ask("resize", {{"size", kSize}, {"shrink", true}}));
  CHECK(ask.disk.size() == kSize);
  CHECK(ask("resize").error().text() == "argument \"size\" is missing");
  CHECK(!ask("resize", {{"size", kSize}, {"preallocation", "some"}}));
  CHECK(!ask("resize", {{"size", "5"}}));
}

TEST_CASE("control commands: a mirror with all its options, and with none") {
  Asked<JobsDisk> ask;
  const JobOptions options{.target = "/target",
                           .format = "raw",
                           .target_is_zero = true,
                           .sync = MirrorSync::top,
                           .granularity = 4096,
                           .buffer = 8192,
                           .in_flight = 3,
                           .rate = 12345,
                           .write_blocking = true,
                           .on_error = OnError::enospc,
                           .when_ready = WhenReady::finish};
  CHECK(ask("mirror", to_json(options))->at("job") == 7);
  CHECK(to_json(ask.disk.options) == to_json(options));

  CHECK(ask("backup", {{"target", "/t"}, {"sync", "top"}}).has_value());
  CHECK(to_json(ask.disk.options) ==
        to_json(JobOptions{.target = "/t", .sync = MirrorSync::top, .kind = JobKind::backup}));
  const JobOptions incremental{.target = "/t", .kind = JobKind::backup, .bitmap = "b"};
  CHECK(ask("backup", to_json(incremental)).has_value());
  CHECK(ask.disk.options.bitmap == "b");
  CHECK(!ask("mirror", {{"target", "/t"}, {"bitmap", "b"}}));
  CHECK(!ask("backup", {{"target", "/t"}, {"when-ready", "complete"}}));
  CHECK(ask("mirror", {{"target", "/t"}}).has_value());
  CHECK(to_json(ask.disk.options) == to_json(JobOptions{.target = "/t"}));
  CHECK(ask("mirror").error().text() == "argument \"target\" is missing or empty");
  CHECK(ask("mirror", {{"target", "t"}}).error().text() == "target \"t\" is not an absolute path");
  CHECK(ask("mirror", {{"target", "/t"}, {"sync", "half"}}).error().text() ==
        "sync \"half\" is none of full, top, none");
  CHECK(!ask("mirror", {{"target", "/t"}, {"on-error", "panic"}}));
  CHECK(!ask("mirror", {{"target", "/t"}, {"when-ready", "now"}}));
  CHECK(!ask("mirror", {{"target", "/t"}, {"in-flight", -1}}));
  CHECK(ask("mirror", {{"target", "/t"}, {"in-flight", uint64_t{1} << 40}}).has_value());
  CHECK(ask.disk.options.in_flight == UINT32_MAX);  // for the job to refuse, not cut to something that fits
  CHECK(!ask("mirror", {{"target", "/t"}, {"colour", "blue"}}));
}

TEST_CASE("control commands: jobs are listed as they are, and take orders") {
  Asked<JobsDisk> ask;
  ask.disk.jobs_ = {{.id = 6, .kind = "mirror", .target = "/a", .state = JobState::completed, .copied = 5},
                    {.id = 7,
                     .kind = "mirror",
                     .target = "/b",
                     .state = JobState::paused,
                     .remaining = uint64_t{1} << 60,
                     .rate = 9,
                     .error = Error(ErrorCode::no_space, "full")}};

  const auto list = ask("jobs");

  REQUIRE(list);
  REQUIRE(list->size() == 2);
  CHECK(list->at(0).at("state") == "completed");
  CHECK(!list->at(0).contains("error"));
  CHECK(list->at(1).at("error").at("code") == "no-space");
  for (const size_t i : {0u, 1u}) CHECK(to_json(job_from_json(list->at(i))) == list->at(i));
  CHECK(job_from_json(Json("garbage")).id == 0);

  for (const char* order : {"pause", "resume", "cancel", "complete", "finish"}) {
    CHECK(ask(std::string("job-") + order, {{"job", 7}}).has_value());
    CHECK(ask.disk.orders.back() == std::string(order) + " 0");
    CHECK(ask(std::string("job-") + order, {{"job", 8}}).error().code() == ErrorCode::not_found);
  }
  CHECK(ask("job-set-rate", {{"job", 7}, {"rate", 100}}).has_value());
  CHECK(ask.disk.orders.back() == "set-rate 100");
  CHECK(ask("job-set-rate", {{"job", 7}}).error().text() == "argument \"rate\" is missing");
  Asked<MemoryDisk> plain;
  CHECK(plain("jobs").error().code() == ErrorCode::unsupported);
}

TEST_CASE("control commands: bitmaps, and what changed a part at a time") {
  constexpr uint64_t kLarge = 100_MiB;
  Asked<BitmapDisk> ask(kLarge);
  REQUIRE(ask("bitmap-add", {{"name", "b"}, {"granularity", 512}}));
  CHECK(ask("bitmap-list")->at(0).at("granularity") == 512);

  uint64_t start = 0;
  unsigned parts = 0;
  while (start < kLarge) {
    const auto part = ask("changed-since", {{"name", "b"}, {"start", start}});
    REQUIRE(part);
    CHECK(part->at("ranges").at(0).at("start") == start);
    REQUIRE(part->at("end") > start);
    start = part->at("end");
    ++parts;
  }

  CHECK(start == kLarge);
  CHECK(parts == kLarge / (512 * 32768) + 1);
  CHECK(ask("changed-since", {{"name", "b"}, {"start", kLarge}})->at("ranges").empty());
  CHECK(!ask("changed-since", {{"name", "b"}, {"start", kLarge + 1}}));
  CHECK(ask("changed-since", {{"name", "c"}}).error().code() == ErrorCode::not_found);
  CHECK(ask("bitmap-clear", {{"name", "c"}}).error().code() == ErrorCode::not_found);
  CHECK(ask("bitmap-remove", {{"name", "b"}}));
  CHECK(ask("bitmap-list")->empty());
}

}  // namespace
}  // namespace imgfuse::control
