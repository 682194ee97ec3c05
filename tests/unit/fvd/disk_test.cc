// What FVD disks do: every combination of compact, base, journal, block and chunk size against a model and an
// independent reader.
#include <doctest/doctest.h>
#include <fmt/format.h>

#include "base/math.h"
#include "fvd_bytes.h"
#include "support/builders.h"
#include "support/fvd_view.h"
#include "support/model_disk.h"

namespace imgfuse::test {
namespace {

MemImage filled(uint64_t size, uint64_t seed) {
  MemImage image;
  image.resize(size);
  image.write(0, pattern(size, seed));
  return image;
}

std::vector<FvdSpec> every_kind() {
  std::vector<FvdSpec> all;
  for (const bool compact : {false, true})
    for (const bool base : {false, true})
      for (const std::optional<uint64_t> journal : {std::optional<uint64_t>(), std::optional<uint64_t>(4096)})
        for (const auto& [block, chunk] :
             {std::pair<uint64_t, uint64_t>(512, 4096), {7680, 122880}, {65536, 1048576}}) {
          if (!base && !compact && block != 512) continue;
          FvdSpec spec{.size = 3_MiB + 512, .base = base, .base_size = base ? 2_MiB + 1536 : 0};
          spec.own.compact = compact;
          if (base) spec.own.block_size = block;
          spec.own.chunk_size = chunk;
          spec.own.journal = journal.has_value();
          spec.own.journal_size = journal;
          all.push_back(spec);
        }
  return all;
}

std::string text_of(const FvdSpec& spec) {
  return fmt::format("{}, {} base, {}, block {}, chunk {}, size {:#x}", spec.own.compact ? "compact" : "plain",
                     spec.base ? "with" : "no", spec.own.journal ? "journal" : "no journal",
                     spec.own.block_size.value_or(0), spec.own.chunk_size, spec.size);
}

/// An image with a base of its own, open.
struct Opened {
  explicit Opened(const FvdSpec& spec) : base(spec.base ? filled(spec.base_size, 99) : MemImage()) {
    memory = std::make_shared<MemStorage>(make_fvd(spec));
    reopen();
  }
  ~Opened() {
    if (disk) (void)disk->close();
  }
  void reopen(bool read_only = false) {
    if (disk) must(disk->close());
    disk = must(open_fvd(memory, {.read_only = read_only, .backing = base}));
  }
  /// As after a power cut that lost nothing that was written.
  void crash() {
    memory = std::make_shared<MemStorage>(memory->image());
    (void)disk->close();
    disk = must(open_fvd(memory, {.backing = base}));
  }
  std::vector<std::byte> read(uint64_t offset, size_t length) { return read_all(*disk, GuestOffset(offset), length); }
  std::vector<std::byte> below(uint64_t offset, size_t length) const {
    std::vector<std::byte> bytes(length);
    base.read(offset, bytes);
    return bytes;
  }

  MemImage base;
  std::shared_ptr<MemStorage> memory;
  std::unique_ptr<Disk> disk;
};

FvdSpec compact(uint64_t chunk = 65536, bool base = false) {
  FvdSpec spec{.size = 4_MiB, .base = base, .base_size = base ? 4_MiB : 0};
  spec.own.compact = true;
  spec.own.chunk_size = chunk;
  spec.own.storage_grow_unit = 1_MiB;
  spec.own.journal_size = 65536;
  return spec;
}

FvdSpec over_base(uint64_t block = 65536) {
  FvdSpec spec{.size = 4_MiB, .base = true, .base_size = 4_MiB};
  spec.own.block_size = block;
  spec.own.journal_size = 65536;
  return spec;
}

}  // namespace

TEST_CASE("fvd: random requests leave what the model says, and an independent reader agrees") {
  uint64_t number = 0;
  for (const FvdSpec& spec : every_kind()) {
    INFO("IMG_SEED=" << base_seed() << ", " << text_of(spec));
    Rng rng(base_seed() + ++number);
    const MemImage base = spec.base ? filled(spec.base_size, 99) : MemImage();
    auto memory = std::make_shared<MemStorage>(make_fvd(spec));
    MemImage content = base;
    content.resize(spec.size);
    ModelDisk model(
        spec.size,
        {{GuestOffset(0), 300_KiB}, {GuestOffset(2_MiB - 150_KiB), 300_KiB}, {GuestOffset(spec.size - 70_KiB), 70_KiB}},
        content);
    Workload workload{.cluster_size = spec.own.compact ? spec.own.chunk_size : 4096};
    for (int life = 0; life < 3; ++life) {
      auto disk = must(open_fvd(memory, {.backing = base}));
      for (uint64_t i = 0; i < from_environment("IMG_RUNS", 100); ++i) {
        std::string what;
        const Result<> result = random_request(*disk, model, workload, rng, what);
        INFO(what);
        REQUIRE(result);
      }
      REQUIRE(model.compare_exactly(*disk) == "");
      must(disk->close());

      const std::optional<FvdView> view = FvdView::parse(memory->image());
      REQUIRE(view);
      CHECK(view->clean);
      CHECK(view->used_journal_sectors == 0);
      CHECK(view->find_corruption() == "");
      auto seen = make_raw_disk(view->content(model.windows(), base));
      REQUIRE(model.compare_exactly(*seen) == "");
      CHECK(must(fvd::check(*memory, Repair::none, [](const std::string&) {})).corruptions == 0);
    }
  }
}

TEST_CASE("fvd: opening and closing without a write changes nothing, not even for writing") {
  for (const bool read_only : {false, true}) {
    Opened d(compact(65536, true));
    d.memory->counts().reset();

    d.reopen(read_only);
    (void)d.read(0, 4096);
    must(d.disk->close());
    d.disk.reset();

    CHECK(d.memory->counts().writes == 0);
    CHECK(d.memory->counts().zeroes == 0);
  }
}

TEST_CASE("fvd: the header says unclean from the first change to metadata until a clean close") {
  Opened d(compact());
  CHECK(peek_le<uint32_t>(d.memory->image(), kClean) == 1);

  must(d.disk->write(GuestOffset(0), pattern(4096)));
  must(d.disk->flush());
  CHECK(peek_le<uint32_t>(d.memory->image(), kClean) == 0);

  must(d.disk->close());
  d.disk.reset();
  CHECK(peek_le<uint32_t>(d.memory->image(), kClean) == 1);
}

TEST_CASE("fvd: a journal is applied in memory when opened read-only, and nothing is written") {
  Opened d(compact(65536, true));
  must(d.disk->write(GuestOffset(100000), pattern(100000, 5)));
  must(d.disk->flush());
  auto crashed = std::make_shared<MemStorage>(d.memory->image(), false);

  auto disk = must(open_fvd(crashed, {.read_only = true, .backing = d.base}));

  CHECK(read_all(*disk, GuestOffset(100000), 100000) == pattern(100000, 5));
  must(disk->close());
  CHECK(crashed->counts().writes + crashed->counts().zeroes + crashed->counts().discards == 0);
}

TEST_CASE("fvd: chunks leaked by a crash read as zeros and are used before the file grows") {
  Opened d(compact());
  must(d.disk->write(GuestOffset(0), pattern(65536, 1)));
  must(d.disk->write(GuestOffset(1_MiB), pattern(65536, 2)));
  must(d.disk->write(GuestOffset(2_MiB), pattern(65536, 3)));
  must(d.disk->flush());
  must(d.disk->close());
  d.disk.reset();
  MemImage image = d.memory->image();
  poke_le<uint32_t>(image, table_of(image) + 16 * 4, 0xFFFFFFFF);  // chunk 1 belongs to nobody
  d.memory = std::make_shared<MemStorage>(image);
  d.reopen();
  const uint64_t size = must(d.memory->size());

  must(d.disk->write(GuestOffset(3_MiB + 5000), pattern(3000, 4)));

  const auto extents = must(d.disk->map({GuestOffset(3_MiB), 65536}));
  CHECK(extents.front().host.bytes() == peek_le<uint64_t>(image, kMetadataSize) + 65536);
  CHECK(must(d.memory->size()) == size);
  CHECK(d.read(3_MiB, 5000) == std::vector<std::byte>(5000));
  CHECK(d.read(3_MiB + 5000, 3000) == pattern(3000, 4));
  CHECK(d.read(3_MiB + 8000, 57536) == std::vector<std::byte>(57536));
}

TEST_CASE("fvd: what a crash left behind the frontier does not show") {
  Opened d(compact());
  must(d.disk->write(GuestOffset(0), pattern(65536, 1)));
  must(d.disk->flush());
  must(d.disk->write(GuestOffset(1_MiB), pattern(65536, 2)));  // never flushed: forgotten
  d.crash();

  CHECK(d.read(1_MiB, 65536) == std::vector<std::byte>(65536));
  must(d.disk->write(GuestOffset(2_MiB), pattern(512, 3)));
  CHECK(d.read(2_MiB + 512, 65024) == std::vector<std::byte>(65024));
  CHECK(d.read(0, 65536) == pattern(65536, 1));
}

TEST_CASE("fvd: the file grows by the unit, and always holds whole chunks") {
  FvdSpec spec = compact(65536);
  spec.own.storage_grow_unit = 2_MiB;
  Opened d(spec);
  const uint64_t start = peek_le<uint64_t>(d.memory->image(), kMetadataSize);

  must(d.disk->write(GuestOffset(0), pattern(512)));
  CHECK(must(d.memory->size()) == start + 2_MiB);

  for (uint64_t at = 0; at < 2_MiB + 65536; at += 65536) must(d.disk->write(GuestOffset(at), pattern(512)));
  CHECK(must(d.memory->size()) == start + 4_MiB);
}

TEST_CASE("fvd: one write to many chunks is one host write where their places are neighbours") {
  Opened d(compact(4096));
  d.memory->counts().reset();

  must(d.disk->write(GuestOffset(1000), pattern(1_MiB)));

  CHECK(d.memory->counts().writes == 1);
  d.memory->counts().reset();
  CHECK(d.read(1000, 1_MiB) == pattern(1_MiB));
  CHECK(d.memory->counts().reads == 1);
}

TEST_CASE("fvd: a partial write of a block that is in the base fills the rest of the block") {
  for (const uint64_t block : {4096u, 7680u, 65536u}) {
    CAPTURE(block);
    Opened d(over_base(block));

    must(d.disk->write(GuestOffset(block * 3 + 100), pattern(300, 7)));
    must(d.disk->write(GuestOffset(block * 5 - 50), pattern(100, 8)));

    CHECK(d.read(block * 3, 100) == d.below(block * 3, 100));
    CHECK(d.read(block * 3 + 100, 300) == pattern(300, 7));
    CHECK(d.read(block * 3 + 400, block - 400) == d.below(block * 3 + 400, block - 400));
    CHECK(d.read(block * 4, block - 50) == d.below(block * 4, block - 50));
    CHECK(d.read(block * 5 - 50, 100) == pattern(100, 8));
    CHECK(d.read(block * 5 + 50, block) == d.below(block * 5 + 50, block));
    const auto view = FvdView::parse(d.memory->image());
    CHECK(view->base_size == 4_MiB);
  }
}

TEST_CASE("fvd: a block that lies in two chunks survives a crash with all it was filled with") {
  // Creation demands chunks of whole blocks; images of other programs may have others.
  FvdSpec spec = compact(65536, true);
  spec.own.block_size = 4096;
  MemImage image = make_fvd(spec);
  poke_le<uint32_t>(image, kBlockSize, 24576);  // 2.67 blocks to a chunk
  const MemImage base = filled(4_MiB, 99);
  const auto memory = std::make_shared<MemStorage>(image);
  auto disk = must(open_fvd(memory, {.backing = base}));

  must(disk->write(GuestOffset(65536 - 8192), pattern(512, 1)));  // block 2 reaches into chunk 1
  must(disk->flush());
  const MemImage crashed = memory->image();
  must(disk->close());

  auto after = must(open_fvd(std::make_shared<MemStorage>(crashed), {.backing = base}));
  std::vector<std::byte> wanted(24576);
  base.read(49152, wanted);
  const std::vector<std::byte> written = pattern(512, 1);
  std::copy(written.begin(), written.end(), wanted.begin() + 8192);
  CHECK(read_all(*after, GuestOffset(49152), 24576) == wanted);
  must(after->close());
}

TEST_CASE("fvd: copies from the base are forgotten by a crash, and the disk reads as before") {
  Opened d(compact(65536, true));
  must(d.disk->populate({GuestOffset(0), 1_MiB}));
  must(d.disk->flush());

  CHECK(FvdView::parse(d.memory->image())->used_journal_sectors == 0);
  d.crash();
  CHECK(must(d.disk->map({GuestOffset(0), 1_MiB})).front().depth == 1);
  CHECK(d.read(0, 1_MiB) == d.below(0, 1_MiB));
  must(d.disk->close());
  d.disk.reset();
}

TEST_CASE("fvd: a clean close keeps what was copied from the base") {
  Opened d(compact(65536, true));
  must(d.disk->populate({GuestOffset(0), 1_MiB}));
  d.reopen();

  const auto extents = must(d.disk->map({GuestOffset(0), 1_MiB}));
  CHECK(extents.front().depth == 0);
  CHECK(d.read(0, 1_MiB) == d.below(0, 1_MiB));
}

TEST_CASE("fvd: a guest write to a copied block makes block and chunk durable") {
  Opened d(compact(65536, true));
  must(d.disk->populate({GuestOffset(0), 256_KiB}));
  must(d.disk->write(GuestOffset(70000), pattern(512, 3)));
  must(d.disk->flush());

  d.crash();

  CHECK(d.read(70000, 512) == pattern(512, 3));
  CHECK(d.read(65536, 4464) == d.below(65536, 4464));
  CHECK(must(d.disk->map({GuestOffset(70000), 512})).front().depth == 0);
  CHECK(must(d.disk->map({GuestOffset(0), 512})).front().depth == 1);
}

TEST_CASE("fvd: an image into which everything was copied says so, and never opens its base again") {
  for (const bool is_compact : {false, true}) {
    CAPTURE(is_compact);
    Opened d(is_compact ? compact(65536, true) : over_base());
    must(d.disk->populate({GuestOffset(0), 4_MiB}));
    must(d.disk->flush());
    CHECK(peek_le<uint32_t>(d.memory->image(), kAllData) == 1);
    must(d.disk->write(GuestOffset(1_MiB), pattern(4096, 1)));
    must(d.disk->close());
    d.disk.reset();

    fvd::OpenParameters parameters;  // no way to open a base
    auto disk = must(fvd::open(d.memory, std::move(parameters)));
    CHECK(read_all(*disk, GuestOffset(0), 1_MiB) == d.below(0, 1_MiB));
    CHECK(read_all(*disk, GuestOffset(1_MiB), 4096) == pattern(4096, 1));
    must(disk->close());
  }
}

TEST_CASE("fvd: what lies behind the base's end is the image's, also in the block that both share") {
  FvdSpec spec = over_base(65536);
  spec.base_size = 1_MiB + 1536;
  Opened d(spec);
  CHECK(d.read(1_MiB + 1536, 4096) == std::vector<std::byte>(4096));

  must(d.disk->write(GuestOffset(1_MiB + 4096), pattern(512, 1)));  // the shared block, behind the end

  CHECK(d.read(1_MiB, 1536) == d.below(1_MiB, 1536));
  CHECK(d.read(1_MiB + 4096, 512) == pattern(512, 1));
  d.crash();
  CHECK(d.read(1_MiB, 1536) == d.below(1_MiB, 1536));
}

TEST_CASE("fvd: a base that is shorter than it was reads as zeros behind its end") {
  Opened d(over_base());
  must(d.disk->close());
  d.disk = must(open_fvd(d.memory, {.backing = filled(1_MiB + 700, 99)}));

  std::vector<std::byte> wanted = pattern(1_MiB + 700, 99);
  wanted.resize(1_MiB + 4096);
  CHECK(d.read(0, 1_MiB + 4096) == wanted);
  must(d.disk->write(GuestOffset(1_MiB + 2000), pattern(10, 2)));
  CHECK(d.read(1_MiB + 700, 1300) == std::vector<std::byte>(1300));
}

TEST_CASE("fvd: a full journal makes room for itself, and recovery finds all") {
  FvdSpec spec = over_base(512);
  spec.own.journal_size = 4096;
  Opened d(spec);
  for (uint64_t i = 0; i < 100; ++i) {
    must(d.disk->write(GuestOffset(i * 20480), pattern(512, i)));
    must(d.disk->flush());
  }

  d.crash();

  for (uint64_t i = 0; i < 100; ++i) CHECK(d.read(i * 20480, 512) == pattern(512, i));
}

TEST_CASE("fvd: an image without a journal is right on disk after each flush") {
  FvdSpec spec = compact(65536, true);
  spec.own.journal = false;
  Opened d(spec);
  must(d.disk->write(GuestOffset(100000), pattern(100000, 1)));
  must(d.disk->flush());
  CHECK(peek_le<uint32_t>(d.memory->image(), kClean) == 1);

  d.crash();

  CHECK(d.read(100000, 100000) == pattern(100000, 1));
}

TEST_CASE("fvd: an unclean image without a journal is for reading only") {
  FvdSpec spec = compact();
  spec.own.journal = false;
  MemImage image = make_fvd(spec);
  poke_le<uint32_t>(image, kClean, 0);

  const auto opened = open_fvd(std::make_shared<MemStorage>(image));

  REQUIRE_FALSE(opened);
  CHECK(opened.error().text().find("--repair all") != std::string::npos);
  must(must(open_fvd(std::make_shared<MemStorage>(image), {.read_only = true}))->close());
}

TEST_CASE("fvd: zeros over the base take no room in a compact image") {
  Opened d(compact(65536, true));

  must(d.disk->write_zeroes({GuestOffset(0), 1_MiB}, Zeroing::may_free));
  must(d.disk->flush());

  CHECK(d.disk->allocated() == 0);
  CHECK(d.read(0, 1_MiB) == std::vector<std::byte>(1_MiB));
  CHECK(must(d.disk->map({GuestOffset(0), 1_MiB})).front().kind == ExtentKind::zero);
  d.crash();
  CHECK(d.read(0, 1_MiB) == std::vector<std::byte>(1_MiB));
  must(d.disk->write(GuestOffset(5000), pattern(100, 1)));
  CHECK(d.read(0, 5000) == std::vector<std::byte>(5000));
}

TEST_CASE("fvd: forgetting gives the base back, and a crash brings nothing of it again") {
  for (const bool is_compact : {false, true}) {
    CAPTURE(is_compact);
    Opened d(is_compact ? compact(65536, true) : over_base());
    must(d.disk->write(GuestOffset(0), pattern(1_MiB, 1)));
    must(d.disk->flush());

    must(d.disk->forget({GuestOffset(0), 512_KiB}));

    CHECK(d.read(0, 512_KiB) == d.below(0, 512_KiB));
    d.crash();
    CHECK(d.read(0, 512_KiB) == d.below(0, 512_KiB));
    std::vector<std::byte> rest = pattern(1_MiB, 1);
    rest.erase(rest.begin(), rest.begin() + 512_KiB);
    CHECK(d.read(512_KiB, 512_KiB) == rest);
  }
}

TEST_CASE("fvd: an image that has everything can still be forgotten, until it is closed") {
  // As commit does with an overlay of which the guest has written every block.
  Opened d(compact(65536, true));
  must(d.disk->write(GuestOffset(0), pattern(4_MiB, 1)));
  must(d.disk->flush());
  CHECK(peek_le<uint32_t>(d.memory->image(), kAllData) == 1);

  must(d.disk->forget({GuestOffset(0), 4_MiB}));

  CHECK(d.read(0, 4_MiB) == d.below(0, 4_MiB));
  CHECK(peek_le<uint32_t>(d.memory->image(), kAllData) == 0);
  d.crash();
  CHECK(d.read(0, 4_MiB) == d.below(0, 4_MiB));
  must(d.disk->write(GuestOffset(0), pattern(512, 2)));
  d.reopen();
  CHECK(d.read(512, 65024) == d.below(512, 65024));
}

TEST_CASE("fvd: a disk grows and shrinks, and what comes back reads as zeros") {
  for (const FvdSpec& spec : every_kind()) {
    INFO(text_of(spec));
    Opened d(spec);
    must(d.disk->write(GuestOffset(0), pattern(spec.size, 1)));
    const uint64_t small = 1_MiB + 512;

    must(d.disk->resize(small, {.shrink = true}));
    CHECK(d.disk->size() == small);
    CHECK(FvdView::parse(d.memory->image())->find_corruption() == "");
    must(d.disk->resize(spec.size));

    std::vector<std::byte> wanted = pattern(spec.size, 1);
    std::fill(wanted.begin() + static_cast<ptrdiff_t>(small), wanted.end(), std::byte{0});
    CHECK(d.read(0, spec.size) == wanted);
    d.reopen();
    CHECK(d.read(0, spec.size) == wanted);
  }
}

TEST_CASE("fvd: a table without room takes it from the journal, or the growth is refused") {
  FvdSpec spec = compact(4096);
  spec.own.journal_size = 1_MiB;
  Opened d(spec);  // 1024 entries: a page
  must(d.disk->write(GuestOffset(4_MiB - 512), pattern(512, 1)));

  must(d.disk->resize(64_MiB));
  must(d.disk->write(GuestOffset(64_MiB - 512), pattern(512, 2)));
  must(d.disk->flush());

  CHECK(peek_le<uint64_t>(d.memory->image(), kJournalSize) < 1_MiB);
  d.crash();
  CHECK(d.read(4_MiB - 512, 512) == pattern(512, 1));
  CHECK(d.read(64_MiB - 512, 512) == pattern(512, 2));
  const auto refused = d.disk->resize(10_GiB);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().text().find("imgfuse convert") != std::string::npos);
}

TEST_CASE("fvd: a data file that is longer than the disk keeps its length") {
  for (const bool is_compact : {false, true}) {
    CAPTURE(is_compact);
    FvdSpec spec = compact(65536);
    spec.own.compact = is_compact;
    spec.data_file = "data";
    MemImage longer;
    longer.resize(spec.size + 3_MiB);
    const auto data = std::make_shared<MemStorage>(longer);
    auto disk = must(open_fvd(std::make_shared<MemStorage>(make_fvd(spec)), {.data = data}));

    (void)read_all(*disk, GuestOffset(0), 4096);
    must(disk->write(GuestOffset(0), pattern(100000, 1)));
    must(disk->close());

    CHECK(must(data->size()) >= longer.size());
  }
}

TEST_CASE("fvd: data in a file of their own begin at its start") {
  for (const bool is_compact : {false, true}) {
    CAPTURE(is_compact);
    FvdSpec spec = compact(65536);
    spec.own.compact = is_compact;
    spec.data_file = "data";
    const auto memory = std::make_shared<MemStorage>(make_fvd(spec));
    const auto data = std::make_shared<MemStorage>();
    auto disk = must(open_fvd(memory, {.data = data}));

    must(disk->write(GuestOffset(0), pattern(100000, 1)));
    must(disk->close());

    std::vector<std::byte> stored(100000);
    data->image().read(0, stored);
    CHECK(stored == pattern(100000, 1));
    disk = must(open_fvd(memory, {.data = data}));
    CHECK(read_all(*disk, GuestOffset(0), 100000) == pattern(100000, 1));
    must(disk->close());
  }
}

namespace {

/// A device of a fixed length, until the image's command makes it longer.
class Device final : public Storage {
 public:
  explicit Device(const MemImage& image) : memory_(image) {}
  const StorageInfo& info() const override { return info_; }
  Result<uint64_t> size() override { return memory_.size(); }
  Result<> read(HostOffset offset, Bytes out) override { return memory_.read(offset, out); }
  using Storage::write;
  Result<> write(HostOffset offset, std::span<const ConstBytes> parts) override { return memory_.write(offset, parts); }
  Result<> write_zeroes(HostRange range) override { return memory_.write_zeroes(range); }
  Result<> discard(HostRange) override { return {}; }
  Result<> allocate(HostRange) override { return {}; }
  Result<> flush() override { return {}; }
  Result<> resize(uint64_t) override { return fail(ErrorCode::invalid, "a device has its size"); }
  Result<StorageExtent> extent(HostRange range) override { return StorageExtent{range.length, true}; }
  Result<uint64_t> allocated() override { return memory_.size(); }
  MemStorage& memory() { return memory_; }

 private:
  MemStorage memory_;
  StorageInfo info_{.name = "/dev/device", .writable = true, .extensible = false};
};

}  // namespace

TEST_CASE("fvd: a full device is made longer by the image's command only where that is allowed") {
  FvdSpec spec = compact(65536);
  spec.own.add_storage_command = "enlarge it";
  MemImage image = make_fvd(spec);
  image.resize(image.size() + 2 * 65536);
  const auto device = std::make_shared<Device>(image);
  {
    auto disk = must(fvd::open(device, {}));
    must(disk->write(GuestOffset(0), pattern(2 * 65536)));
    const auto refused = disk->write(GuestOffset(1_MiB), pattern(512));
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code() == ErrorCode::no_space);
    CHECK(refused.error().text().find("--allow-storage-command") != std::string::npos);
    must(disk->close());
  }
  std::string said;
  fvd::OpenParameters parameters;
  parameters.grow_device = [&](const std::string& command, uint64_t bytes, const std::string& name) -> Result<> {
    said = fmt::format("{}|{}|{}", command, bytes, name);
    return device->memory().write(HostOffset(image.size()), pattern(bytes, 66));
  };
  auto disk = must(fvd::open(device, std::move(parameters)));
  must(disk->write(GuestOffset(1_MiB), pattern(512)));
  CHECK(said == "enlarge it|1048576|/dev/device");
  // A device may hold anything where a new chunk lies.
  CHECK(read_all(*disk, GuestOffset(1_MiB + 512), 65024) == std::vector<std::byte>(65024));
  must(disk->close());
}

}  // namespace imgfuse::test
