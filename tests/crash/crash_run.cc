#include "crash_run.h"

#include <fmt/format.h>

#include <array>
#include <cstdlib>
#include <future>

#include "base/math.h"
#include "support/crash_storage.h"
#include "support/fvd_view.h"
#include "support/image_view.h"
#include "support/model_disk.h"
#include "support/order_storage.h"

namespace imgfuse::test {
namespace {

/// One scenario's run: makes requests, and looks at crashed images whenever the storage changes.
class CrashRun {
 public:
  CrashRun(const Scenario& scenario, const TemporaryDirectory& directory, uint64_t seed, Totals& totals)
      : scenario_(scenario), directory_(directory), totals_(totals), rng_(seed) {
    workload_.cluster_size = scenario.cluster_size;
    workload_.loose = scenario.compress.has_value();
    workload_.zeros = true;
    workload_.subclusters = scenario.extended_l2;
    workload_.growth =
        !is_huge() && (scenario.version != 2 || scenario.start != Start::snapshot);  // version 2 cannot grow with one
  }

  void go(uint64_t states) {
    const uint64_t size = disk_size(scenario_);
    const uint64_t clusters = scenario_.cluster_size <= 4096 ? 40 : scenario_.cluster_size <= 65536 ? 6 : 2;
    const std::vector<GuestRange> windows =
        is_huge() ? std::vector<GuestRange>{{GuestOffset(0), 64_KiB},
                                            {GuestOffset(scenario_.cluster_size - 32_KiB), 64_KiB},
                                            {GuestOffset(round_down(size - 64_KiB, 512)), 64_KiB}}
                  : windows_for(size, scenario_.cluster_size, clusters, scenario_.coverage());
    const Beginning beginning = begin(scenario_, windows, directory_, rng_);
    backing_ = beginning.backing;
    backing_.save(directory_ / "backing.raw");
    ModelDisk model(size, windows, beginning.content);
    limit_ = states;
    live(beginning.files, model, ~uint64_t{0}, 0);
    totals_.states += states_;
  }

 private:
  /// Whole clusters are more than a test can look at thousands of times.
  bool is_huge() const { return scenario_.cluster_size > 2_MiB; }

  bool is_qcow2() const { return !scenario_.fvd && scenario_.table_size == 0; }

  /// Works on `image` until enough states were seen, or `requests` were made.
  void live(const Files& files, ModelDisk& model, uint64_t requests, int depth) {
    auto storage = std::make_shared<CrashStorage>(files.image);
    auto data = std::make_shared<CrashStorage>(files.data);
    auto ordered = std::make_shared<OrderStorage>(storage, files.image);
    // Another thread looks, as this one holds locks of the interrupted disk.
    const auto observer = [&] {
      if (failed_ || states_ >= limit_) return;
      std::async(std::launch::async, [&] { crash(*storage, *data, model, depth); }).get();
    };
    storage->set_observer(observer);
    data->set_observer(observer);
    auto disk = must(open_image(
        ordered, {.metadata_cache = 64_KiB, .backing = backing_, .compress = scenario_.compress, .data = data}));
    constexpr std::array kModes = {DetectZeroes::off, DetectZeroes::off, DetectZeroes::on, DetectZeroes::unmap};
    disk->set_detect_zeroes(kModes[rng_.below(kModes.size())]);
    if (depth == 0 && is_qcow2() && rng_.one_in(2)) {  // not while clusters come to be counted ahead, but from then on
      storage->set_observer({});
      for (int i = 0; i < 40 && !ImageView::parse(storage->image())->counts_ahead(); ++i)
        must(random_request(*disk, model, workload_, rng_, request_));
      storage->set_observer(observer);
    }
    for (uint64_t i = 0; i < requests && !failed_ && states_ < limit_; ++i) {
      if (scenario_.copies && rng_.one_in(3)) copy(*disk, model);
      Result<> result = random_request(*disk, model, workload_, rng_, request_);
      if (scenario_.fvd && !result && result.error().code() == ErrorCode::unsupported) break;  // no room for the table
      require(result.has_value(), result ? "" : result.error().text());
    }
    request_ = "close";
    must(disk->close());
    model.flushed();
    storage->set_observer({});
    data->set_observer({});
    if (!failed_) require_equal(model, {storage->image(), data->image()}, depth == 0);
  }

  /// From the backing file, as in the background; sometimes everything, and then it is not used any more.
  void copy(Disk& disk, const ModelDisk& model) {
    const GuestRange window = model.windows()[rng_.below(model.windows().size())];
    const uint64_t begin = rng_.below(window.length);
    GuestRange range{window.begin + begin, rng_.between(1, window.length - begin)};
    if (rng_.one_in(30)) range = {GuestOffset(0), disk.size()};
    request_ = fmt::format("copy {:#x}+{:#x}", range.begin.bytes(), range.length);
    const Result<> copied = disk.populate(range, rng_.one_in(2) ? Holes::fill : Holes::keep);
    require(copied.has_value(), copied ? "" : copied.error().text());
  }

  /// Looks at some of the images that a crash at this moment may leave.
  void crash(const CrashStorage& storage, const CrashStorage& data, const ModelDisk& model, int depth) {
    const size_t pending = storage.pending();
    const auto any = [&] { return kCrashModes[rng_.below(std::size(kCrashModes))]; };
    const auto with_data = [&](MemImage image) { return Files{std::move(image), data.crash(any(), rng_)}; };
    if (pending <= 3 && rng_.one_in(4)) {
      for (uint64_t chosen = 0; chosen < uint64_t{1} << pending; ++chosen)
        look(with_data(storage.crash(chosen)), model, depth);
      return;
    }
    look(with_data(storage.crash(CrashMode::all, rng_)), model, depth);
    if (pending + data.pending() > 0) look(with_data(storage.crash(any(), rng_)), model, depth);
  }

  /// One crashed image: it must check clean but for leaks, open for writing, and read as the model allows. Postponed
  /// counts are put right by opening it, and nothing else is.
  void look(const Files& found, const ModelDisk& model, int depth) {
    if (failed_) return;
    ++states_;
    auto view = ImageView::parse(found.image);
    require(view != nullptr, "no image is left");
    if (failed_) return save(found);
    Files crashed = found;
    if (view->is_lazy()) {
      auto disk = open_for_reading(found);
      require(disk.has_value(), "cannot be opened read-only");
      if (disk) require((wrong_ = model.compare(**disk)).empty(), "before the repair: " + wrong_);
      crashed.image =
          reopened(found.image,
                   {.metadata_cache = 64_KiB, .backing = backing_, .data = std::make_shared<MemStorage>(found.data)});
      view = ImageView::parse(crashed.image);
      require(!view->is_dirty(), "dirty after it was opened");
      ++totals_.dirty;
    }
    require(view->find_corruption().empty(), view->find_corruption());
    if (!failed_) {
      const CheckReport report = check_image(crashed.image);
      require(report.corruptions == 0 && report.check_errors == 0, "the check finds corruptions");
    }
    if (const auto* fvd = dynamic_cast<const FvdView*>(view.get()); fvd && !failed_) {
      auto raw = make_raw_disk(fvd->content(model.windows(), backing_, &crashed.data));
      require((wrong_ = model.compare(*raw)).empty(), "the independent reader: " + wrong_);
    }
    if (!failed_) {
      const auto data = std::make_shared<MemStorage>(crashed.data);
      const bool read_only = rng_.one_in(4);
      const auto image = std::make_shared<MemStorage>(crashed.image);
      auto disk =
          open_image(image, {.read_only = read_only, .metadata_cache = 64_KiB, .backing = backing_, .data = data});
      require(disk.has_value(), disk ? "" : disk.error().text());
      if (!disk) return save(crashed);
      const std::string wrong = model.compare(**disk);
      require_raw(**disk, crashed.data, model);
      must((*disk)->close());
      require(wrong.empty(), wrong);
      if (view->counts_ahead() && !read_only) {
        ++totals_.counted_ahead;
        require(check_image(image->image()).leaks == 0, "what was counted ahead is not given back");
      }
    }
    if (failed_) return save(crashed);
    if ((totals_.states + states_) % kQemuEvery == 0 && have_qemu_img()) {
      confirm(crashed);
      if (ImageView::parse(found.image)->is_lazy()) confirm(found);
    }
    if (depth < 2 && rng_.one_in(10)) live_again(found, model, depth + 1);
  }

  /// Goes on with a crashed image for a few requests, with crashes.
  void live_again(const Files& crashed, const ModelDisk& model, int depth) {
    ModelDisk survivor = model;
    {
      auto disk = must(open_for_reading(crashed));
      const std::string wrong = survivor.settle(*disk);
      require(wrong.empty(), wrong);
    }
    const std::string before = request_;
    live(crashed, survivor, 3, depth);
    request_ = before;
  }

  /// Read-only.
  Result<std::unique_ptr<Disk>> open_for_reading(const Files& files) const {
    return open_image(std::make_shared<MemStorage>(files.image),
                      {.read_only = true, .backing = backing_, .data = std::make_shared<MemStorage>(files.data)});
  }

  /// A raw data file reads as the disk does, whatever a crash has left of both.
  void require_raw(Disk& disk, const MemImage& data, const ModelDisk& model) {
    if (scenario_.data_file != DataFile::raw) return;
    for (const GuestRange window : model.windows()) {
      if (window.end().bytes() > disk.size()) continue;  // a growth that is lost
      std::vector<std::byte> raw(window.length);
      data.read(window.begin.bytes(), raw);
      require(read_all(disk, window.begin, window.length) == raw,
              fmt::format("the raw data file differs in the window at {:#x}", window.begin.bytes()));
    }
  }

  /// QEMU looks for the data file where it is called.
  void confirm(const Files& crashed) {
    if (!scenario_.opens_in_qemu()) return;
    const std::string check = fmt::format("cd {} && qemu-img check -q -f {} ", directory_ / ".", scenario_.format());
    crashed.image.save(directory_ / "crashed");
    crashed.data.save(directory_ / "data.raw");
    if (ImageView::parse(crashed.image)->is_lazy()) (void)run(check + "-r all crashed");
    const int status = run(check + "crashed");
    require(status == 0 || status == 3, fmt::format("qemu-img check ends with {}", status));
    ++totals_.confirmed;
  }

  void require_equal(const ModelDisk& model, const Files& files, bool without_leaks) {
    auto disk = must(open_for_reading(files));
    const std::string wrong = model.compare_exactly(*disk);
    require(wrong.empty(), "after close: " + wrong);
    require_raw(*disk, files.data, model);
    require(
        scenario_.data_file == DataFile::none || scenario_.fvd || !without_leaks || files.data.size() == disk->size(),
        "after close: the data file is not as long as the disk");
    require(!ImageView::parse(files.image)->is_dirty(), "after close: dirty");
    const CheckReport report = check_image(files.image);
    require(report.corruptions == 0 && report.check_errors == 0, "after close: corruptions");
    require(report.leaks == 0 || !without_leaks, "after close: leaks, without a crash");
  }

  void require(bool ok, const std::string& what) {
    if (ok || failed_) return;
    failed_ = true;
    FAIL_CHECK(scenario_.text() << ", state " << states_ << ", during " << request_ << ":\n  " << what);
  }

  void save(const Files& crashed) const {
    const char* path = std::getenv("IMG_SAVE");
    if (path == nullptr) return;
    crashed.image.save(path);
    crashed.data.save(std::string(path) + ".data");
  }

  static constexpr uint64_t kQemuEvery = 70;

  const Scenario scenario_;
  const TemporaryDirectory& directory_;
  Totals& totals_;
  Rng rng_;
  Workload workload_;
  MemImage backing_;
  uint64_t limit_ = 0;
  uint64_t states_ = 0;
  bool failed_ = false;
  std::string request_ = "open", wrong_;
};

}  // namespace

void crash_often(const Scenario& scenario, const TemporaryDirectory& directory, uint64_t seed, uint64_t states,
                 Totals& totals) {
  CrashRun(scenario, directory, seed, totals).go(states);
}

}  // namespace imgfuse::test
