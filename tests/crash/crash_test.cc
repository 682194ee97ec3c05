// Power cuts at every moment: a crashed image opens, checks clean (leaks apart), and holds everything that was flushed.
#include <doctest/doctest.h>
#include <fmt/format.h>
#include <unistd.h>

#include <bit>
#include <cstdlib>
#include <filesystem>
#include <future>

#include "base/math.h"
#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/fvd_view.h"
#include "support/image_view.h"
#include "support/model_disk.h"
#include "support/order_storage.h"

namespace imgfuse::test {
namespace {

/// What the disk starts from.
enum class Start {
  empty,
  backing,
  snapshot,  ///< every cluster is shared with one
  compressed,
  crowded,  ///< the next writes need a longer refcount table
};

/// Where guest data lies, if not in the image.
enum class DataFile { none, plain, raw };

struct Scenario {
  uint32_t cluster_size;
  uint32_t refcount_bits;
  uint32_t version;
  Start start;
  uint64_t weight = 1;                       ///< share of the states; images of large clusters are slow
  std::optional<std::string> compress = {};  ///< whole clusters that are written
  bool extended_l2 = false;
  bool lazy_refcounts = false;
  DataFile data_file = DataFile::none;
  uint32_t table_size = 0;          ///< of a QED image; 0: it is qcow2
  std::optional<FvdSpec> fvd = {};  ///< it is FVD: its own options
  bool copies = false;              ///< in between the backing file is copied
  const char* format() const { return table_size > 0 ? "qed" : "qcow2"; }
  /// Guest bytes that one L2 table maps, 8 bytes to a cluster.
  uint64_t coverage() const { return uint64_t{cluster_size} / 8 * cluster_size * std::max(table_size, 1u); }
  /// It does not open tables of one cluster, and computes the largest disk modulo 2^64.
  bool opens_in_qemu() const {
    const uint64_t entries = uint64_t{cluster_size} / 8 * table_size;
    if (fvd) return false;
    return table_size == 0 || (table_size > 1 && 2 * std::countr_zero(entries) + std::countr_zero(cluster_size) < 64);
  }
  std::string text() const {
    if (fvd)
      return fmt::format("FVD, {}, block size {}, chunk size {}, journal {}{}{}{}",
                         fvd->own.compact ? "compact" : "not compact", fvd->own.block_size.value_or(0),
                         fvd->own.chunk_size, fvd->own.journal ? fvd->own.journal_size.value_or(0) : 0,
                         start == Start::backing ? ", with base" : "", copies ? ", being copied" : "",
                         data_file == DataFile::none ? "" : ", data file");
    if (table_size > 0)
      return fmt::format("QED, cluster size {}, table size {}{}", cluster_size, table_size,
                         start == Start::backing ? ", with backing" : "");
    const char* data_files[] = {"", ", data file", ", raw data file"};
    const char* starts[] = {"empty", "backing", "snapshot", "compressed", "crowded"};
    return fmt::format("cluster size {}, {} refcount bits, version {}, start {}, {} compression{}{}{}", cluster_size,
                       refcount_bits, version, starts[static_cast<int>(start)], compress.value_or("no"),
                       extended_l2 ? ", extended L2" : "", lazy_refcounts ? ", lazy refcounts" : "",
                       data_files[static_cast<int>(data_file)]);
  }
};

/// A directory for the images that qemu-img sees.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "imgfuse-crash-XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()));
    path_ = name;
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

int run(const std::string& command) {
  const int status = std::system((command + " >/dev/null 2>&1").c_str());
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

bool have_qemu_img() {
  static const bool have = run("qemu-img --version") == 0;
  return have;
}

/// An image's own file, and its external data file; without one that is empty and unused.
struct Files {
  MemImage image;
  MemImage data;
};

/// The image and the content that a scenario begins with.
struct Beginning {
  Files files;
  MemImage backing;
  MemImage content;  ///< what the guest reads
};

uint64_t disk_size(const Scenario& scenario) {
  const uint64_t cluster_size = scenario.cluster_size;
  if (scenario.start == Start::crowded) return 4_MiB;
  if (scenario.fvd) return 4_MiB + 1536;
  if (scenario.table_size > 0)
    return std::min<uint64_t>(scenario.coverage() * 3, 20_GiB) + round_down(cluster_size / 2, 512);
  return std::min<uint64_t>(scenario.coverage() * 3, 300_MiB) +
         round_down(cluster_size / 2, 512);  // ends inside a cluster
}

/// Data over the windows, in places, so that there is something to overwrite; half of it can be compressed.
MemImage random_content(uint64_t size, const std::vector<GuestRange>& windows, Rng& rng) {
  MemImage content;
  content.resize(size);
  for (const GuestRange window : windows)
    for (uint64_t at = 0; at < window.length; at += 512) {
      if (at / 4096 % 3 == 0) continue;
      content.write(window.begin.bytes() + at, pattern(64, rng.next()));
      if (at / 4096 % 3 == 1) content.write(window.begin.bytes() + at + 64, pattern(448, rng.next()));
    }
  content.resize(size);
  return content;
}

Beginning begin(const Scenario& scenario, const std::vector<GuestRange>& windows, const TemporaryDirectory& directory,
                Rng& rng) {
  const uint64_t size = disk_size(scenario);
  Beginning beginning;
  Qcow2Spec spec{size, scenario.cluster_size, scenario.refcount_bits, scenario.version, {}};
  spec.extended_l2 = scenario.extended_l2;
  spec.lazy_refcounts = scenario.lazy_refcounts;
  spec.data_file = scenario.data_file != DataFile::none;
  spec.data_file_raw = scenario.data_file == DataFile::raw;
  spec.compression = scenario.compress.value_or("zlib");
  const auto make = [&] {
    if (scenario.fvd) {
      FvdSpec fvd = *scenario.fvd;
      fvd.size = size;
      fvd.base = scenario.start == Start::backing;
      fvd.base_size = round_up(beginning.backing.size(), 512);
      if (spec.data_file) fvd.data_file = "data.raw";
      return make_fvd(fvd);
    }
    return scenario.table_size == 0 ? make_qcow2(spec)
                                    : make_qed({size, scenario.cluster_size, scenario.table_size, spec.backing});
  };
  beginning.content.resize(size);
  if (spec.data_file) beginning.files.data.resize(size);
  const std::string image = directory / "start.qcow2";
  switch (scenario.start) {
    case Start::empty:
      beginning.files.image = make();
      break;
    case Start::backing:
      spec.backing = "backing.raw";
      beginning.backing = random_content(size, windows, rng);
      if (rng.one_in(2)) {  // longer than the overlay: what growth gains must not show it
        beginning.backing.write(size, pattern(scenario.cluster_size * 4, rng.next()));
      } else {
        beginning.backing.resize(size - scenario.cluster_size * 3 / 2 / 512 * 512);
      }
      beginning.content = beginning.backing;
      beginning.content.resize(size);
      beginning.files.image = make();
      break;
    case Start::snapshot: {
      beginning.content = random_content(size, windows, rng);
      auto storage = std::make_shared<MemStorage>(make_qcow2(spec));
      auto disk = must(open_qcow2(storage));
      for (const GuestRange window : windows) {
        std::vector<std::byte> bytes(window.length);
        beginning.content.read(window.begin.bytes(), bytes);
        must(disk->write(window.begin, bytes));
      }
      must(disk->close());
      storage->image().save(image);
      REQUIRE(run("qemu-img snapshot -c first " + image) == 0);
      beginning.files.image = MemImage::load(image);
      break;
    }
    case Start::crowded: {  // 64 refcount table entries of 64 clusters each
      auto storage = std::make_shared<MemStorage>(make_qcow2(spec));
      auto disk = must(open_qcow2(storage));
      for (uint64_t at = 1_MiB; must(storage->size()) < 2_MiB - 10_KiB; at += 4096)
        must(disk->write(GuestOffset(at), pattern(4096, at)));
      must(disk->close());
      beginning.files.image = storage->image();
      break;
    }
    case Start::compressed:
      beginning.content = random_content(size, windows, rng);
      beginning.content.save(directory / "start.raw");
      REQUIRE(
          run(fmt::format("qemu-img convert -c -f raw -O qcow2 -o cluster_size={},refcount_bits={},compat={}{}{} {} {}",
                          scenario.cluster_size, scenario.refcount_bits, scenario.version == 2 ? "0.10" : "1.1",
                          scenario.extended_l2 ? ",extended_l2=on" : "",
                          scenario.lazy_refcounts ? ",lazy_refcounts=on" : "", directory / "start.raw", image)) == 0);
      beginning.files.image = MemImage::load(image);
      break;
  }
  return beginning;
}

struct Totals {
  uint64_t states = 0;
  uint64_t confirmed = 0;  ///< by qemu-img
  uint64_t dirty = 0;      ///< with postponed counts
};

/// One scenario's run: makes requests, and looks at crashed images whenever the storage changes.
class CrashRun {
 public:
  CrashRun(const Scenario& scenario, const TemporaryDirectory& directory, uint64_t seed, Totals& totals)
      : scenario_(scenario), directory_(directory), totals_(totals), rng_(seed) {
    workload_.cluster_size = scenario.cluster_size;
    workload_.loose = scenario.compress.has_value();
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
      auto disk = open_image(std::make_shared<MemStorage>(crashed.image),
                             {.read_only = read_only, .metadata_cache = 64_KiB, .backing = backing_, .data = data});
      require(disk.has_value(), disk ? "" : disk.error().text());
      if (!disk) return save(crashed);
      const std::string wrong = model.compare(**disk);
      require_raw(**disk, crashed.data, model);
      must((*disk)->close());
      require(wrong.empty(), wrong);
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

std::vector<Scenario> scenarios() {
  std::vector<Scenario> all;
  for (const uint32_t cluster_size : {512u, 4096u, 65536u, 2097152u}) {
    const uint64_t weight = cluster_size <= 4096 ? 4 : cluster_size <= 65536 ? 2 : 1;
    for (const uint32_t bits : {1u, 2u, 4u, 8u, 16u, 32u, 64u})
      for (const Start start : {Start::empty, Start::backing}) all.push_back({cluster_size, bits, 3, start, weight});
    for (const Start start : {Start::empty, Start::backing, Start::snapshot, Start::compressed})
      all.push_back({cluster_size, 16, 2, start, weight});
    for (const uint32_t bits : {4u, 8u, 16u, 64u})
      for (const Start start : {Start::snapshot, Start::compressed})
        all.push_back({cluster_size, bits, 3, start, weight});
  }
  for (const uint32_t bits : {1u, 2u, 4u, 16u, 64u})
    for (const uint32_t cluster_size : {512u, 4096u, 65536u})
      for (const Start start : {Start::empty, Start::backing, Start::snapshot, Start::compressed})
        if (bits >= 4 || start <= Start::backing)
          all.push_back({cluster_size, bits, bits == 16 && start == Start::backing ? 2u : 3u, start, 2, "zlib"});
  all.push_back({4096, 16, 3, Start::empty, 2, "zstd"});
  for (const uint32_t cluster_size : {16384u, 65536u, 2097152u})
    for (const Start start : {Start::empty, Start::backing, Start::snapshot, Start::compressed})
      all.push_back({cluster_size, 16, 3, start, cluster_size <= 65536 ? 3u : 1u, {}, true});
  all.push_back({16384, 16, 3, Start::backing, 2, "zlib", true});
  for (int i = 0; i < 4; ++i) all.push_back({512, 64, 3, Start::crowded, 1});
  for (const uint32_t cluster_size : {512u, 4096u, 65536u, 2097152u})
    for (const uint32_t bits : {1u, 16u, 64u})
      for (const Start start : {Start::empty, Start::backing, Start::snapshot, Start::compressed})
        if (bits > 1 || start <= Start::backing)
          all.push_back({cluster_size, bits, 3, start, cluster_size <= 65536 ? 3u : 1u, {}, false, true});
  for (const Start start : {Start::empty, Start::backing, Start::snapshot, Start::compressed}) {
    all.push_back({65536, 16, 3, start, 2, {}, true, true});
    all.push_back({4096, 16, 3, start, 2, "zlib", false, true});
  }
  for (int i = 0; i < 4; ++i) all.push_back({512, 64, 3, Start::crowded, 1, {}, false, true});
  for (const uint32_t cluster_size : {512u, 4096u, 16384u, 65536u, 2097152u}) {
    Scenario scenario{cluster_size, 16, 3, Start::empty, cluster_size <= 65536 ? 3u : 1u};
    for (const bool extended : {false, true}) {
      scenario.extended_l2 = extended;
      if (extended && cluster_size < 16384) continue;
      for (const DataFile kind : {DataFile::plain, DataFile::raw}) {
        scenario.data_file = kind;
        all.push_back(scenario);
      }
      scenario.start = Start::backing;
      scenario.data_file = DataFile::plain;
      all.push_back(scenario);
      scenario.start = Start::empty;
      scenario.lazy_refcounts = !scenario.lazy_refcounts;
    }
  }
  if (!have_qemu_img())
    std::erase_if(all, [](const Scenario& s) { return s.start == Start::snapshot || s.start == Start::compressed; });
  return all;
}

std::vector<Scenario> qed_scenarios() {
  std::vector<Scenario> all;
  for (const uint32_t cluster_size : {4096u, 65536u, 2097152u, 67108864u})
    for (const uint32_t table_size : {1u, 2u, 4u, 8u, 16u})
      for (const Start start : {Start::empty, Start::backing})
        all.push_back({.cluster_size = cluster_size,
                       .start = start,
                       .weight = cluster_size <= 65536 ? 10u : 1u,
                       .table_size = table_size});
  return all;
}

std::vector<Scenario> fvd_scenarios() {
  std::vector<Scenario> all;
  for (const bool compact : {false, true})
    for (const Start start : {Start::empty, Start::backing})
      for (const std::optional<uint64_t> journal :
           {std::optional<uint64_t>(), std::optional<uint64_t>(4096), std::optional<uint64_t>(65536)})
        for (const uint32_t block : {512u, 7680u, 65536u})
          for (const bool copies : {false, true}) {
            if (start == Start::empty && (copies || block != 512)) continue;
            FvdSpec spec;
            spec.own.compact = compact;
            if (start == Start::backing) spec.own.block_size = block;
            spec.own.chunk_size = block == 7680 ? 122880 : block == 512 ? 16384 : 131072;
            spec.own.storage_grow_unit = 262144;
            spec.own.journal = journal.has_value();
            spec.own.journal_size = journal;
            Scenario scenario{.cluster_size = static_cast<uint32_t>(compact ? spec.own.chunk_size : block),
                              .refcount_bits = 16,
                              .version = 3,
                              .start = start,
                              .fvd = spec,
                              .copies = copies};
            all.push_back(scenario);
            if (block == 65536 || copies || !journal) continue;
            scenario.data_file = DataFile::plain;
            all.push_back(scenario);
          }
  return all;
}

void crash_in(const std::vector<Scenario>& all) {
  const uint64_t wanted = from_environment("IMG_CRASH_STATES", 24000);
  const uint64_t only = from_environment("IMG_SCENARIO", ~uint64_t{0});
  uint64_t weights = 0;
  for (const Scenario& scenario : all) weights += scenario.weight;

  const TemporaryDirectory directory;
  Totals totals;
  for (size_t i = 0; i < all.size(); ++i) {
    if (only != ~uint64_t{0} && only != i) continue;
    INFO("IMG_SEED=" << base_seed() << " IMG_SCENARIO=" << i << " IMG_CRASH_STATES=" << wanted);
    CrashRun(all[i], directory, base_seed() + i, totals).go(wanted * all[i].weight / weights + 1);
  }
  MESSAGE(totals.states << " crash states in " << all.size() << " scenarios, " << totals.confirmed
                        << " confirmed by qemu-img check, " << totals.dirty
                        << " with postponed counts, IMG_SEED=" << base_seed());
}

TEST_CASE("qcow2: after a crash at any moment everything that was flushed is there") { crash_in(scenarios()); }

TEST_CASE("qed: after a crash at any moment everything that was flushed is there") { crash_in(qed_scenarios()); }

TEST_CASE("fvd: after a crash at any moment everything that was flushed is there") { crash_in(fvd_scenarios()); }

}  // namespace
}  // namespace imgfuse::test
