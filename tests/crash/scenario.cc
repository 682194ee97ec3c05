#include "scenario.h"

#include <fmt/format.h>

#include <bit>
#include <cstdlib>

#include "base/math.h"

namespace imgfuse::test {

bool Scenario::opens_in_qemu() const {
  const uint64_t entries = uint64_t{cluster_size} / 8 * table_size;
  if (fvd) return false;
  return table_size == 0 || (table_size > 1 && 2 * std::countr_zero(entries) + std::countr_zero(cluster_size) < 64);
}

std::string Scenario::text() const {
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

int run(const std::string& command) {
  const int status = std::system((command + " >/dev/null 2>&1").c_str());
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

bool have_qemu_img() {
  static const bool have = run("qemu-img --version") == 0;
  return have;
}

uint64_t disk_size(const Scenario& scenario) {
  const uint64_t cluster_size = scenario.cluster_size;
  if (scenario.start == Start::crowded) return 4_MiB;
  if (scenario.fvd) return 4_MiB + 1536;
  if (scenario.table_size > 0)
    return std::min<uint64_t>(scenario.coverage() * 3, 20_GiB) + round_down(cluster_size / 2, 512);
  return std::min<uint64_t>(scenario.coverage() * 3, 300_MiB) +
         round_down(cluster_size / 2, 512);  // ends inside a cluster
}

namespace {

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

}  // namespace

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

}  // namespace imgfuse::test
