// Power cuts at every moment: a crashed image opens, checks clean (leaks apart), and holds everything that was flushed.
#include "crash_run.h"
#include "support/model_disk.h"

namespace imgfuse::test {
namespace {

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
    crash_often(all[i], directory, base_seed() + i, wanted * all[i].weight / weights + 1, totals);
  }
  MESSAGE(totals.states << " crash states in " << all.size() << " scenarios, " << totals.confirmed
                        << " confirmed by qemu-img check, " << totals.dirty << " with postponed counts, "
                        << totals.counted_ahead << " with counts ahead given back, IMG_SEED=" << base_seed());
}

TEST_CASE("qcow2: after a crash at any moment everything that was flushed is there") { crash_in(scenarios()); }

TEST_CASE("qed: after a crash at any moment everything that was flushed is there") { crash_in(qed_scenarios()); }

TEST_CASE("fvd: after a crash at any moment everything that was flushed is there") { crash_in(fvd_scenarios()); }

}  // namespace
}  // namespace imgfuse::test
