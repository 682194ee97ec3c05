#include "format/qcow2/rebuild.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <vector>

#include "base/buffer.h"
#include "base/math.h"
#include "format/qcow2/l2_entry.h"
#include "format/qcow2/layout.h"
#include "format/qcow2/refcounts.h"
#include "format/qcow2/table_writer.h"

namespace imgfuse::qcow2 {
namespace {

/// The new structures, in host clusters: snapshot table, blocks, refcount table, one behind the other.
struct Plan {
  uint64_t first = 0;
  uint64_t snapshot_clusters = 0;
  std::vector<uint64_t> blocks;  // which stretches of clusters need one, ascending
  uint64_t table_clusters = 0;

  uint64_t first_block() const { return first + snapshot_clusters; }
  uint64_t table() const { return first_block() + blocks.size(); }
  uint64_t end() const { return table() + table_clusters; }
};

/// Stretches that need a block if [first, end) is in use besides what has references.
std::vector<uint64_t> blocks_for(const ReferenceCounts& references, uint64_t per_block, uint64_t first, uint64_t end) {
  std::vector<uint64_t> blocks;
  for (auto cluster = references.next(0); cluster && *cluster < first;
       cluster = references.next((blocks.back() + 1) * per_block))
    blocks.push_back(*cluster / per_block);
  for (uint64_t block = first / per_block; block * per_block < end; ++block)
    if (blocks.empty() || blocks.back() < block) blocks.push_back(block);
  return blocks;
}

Result<Plan> plan_structures(const Header& header, const RebuildInput& input, uint64_t snapshot_bytes) {
  const uint64_t cluster_size = header.cluster_size();
  const uint64_t per_block = header.refcounts_per_block();
  Plan plan;
  plan.first = input.first_free;
  plan.snapshot_clusters = divide_up(snapshot_bytes, cluster_size);
  for (bool grown = true; grown;) {
    std::vector<uint64_t> blocks =
        blocks_for(input.references, per_block, plan.first, std::max(plan.end(), plan.first + 1));
    const uint64_t table_clusters = divide_up((blocks.back() + 1) * 8, cluster_size);
    grown = blocks.size() != plan.blocks.size() || table_clusters != plan.table_clusters;
    plan.blocks = std::move(blocks);
    plan.table_clusters = table_clusters;
    if (table_clusters * cluster_size > kMaxRefcountTableBytes)
      return fail(ErrorCode::no_space, "a new refcount table of {} bytes would be larger than 8 MiB",
                  table_clusters * cluster_size);
  }
  if (plan.end() > kMaxHostOffset / cluster_size)
    return fail(ErrorCode::no_space, "no room for new refcount structures below 2^56");
  return plan;
}

Result<> write_blocks(Storage& storage, const Header& header, const RebuildInput& input, const Plan& plan) {
  const uint64_t per_block = header.refcounts_per_block();
  const uint32_t bits = 1u << header.refcount_order;
  Buffer block(header.cluster_size());
  for (size_t i = 0; i < plan.blocks.size(); ++i) {
    const uint64_t first = plan.blocks[i] * per_block;
    const uint64_t last = first + per_block;
    std::memset(block.data(), 0, block.size());
    for (auto c = input.references.next(first); c && *c < last; c = input.references.next(*c + 1))
      set_refcount(block.bytes(), *c - first, bits,
                   std::min<uint64_t>(input.references.get(*c), header.max_refcount()));
    for (uint64_t c = std::max(first, plan.first); c < std::min(last, plan.end()); ++c)
      set_refcount(block.bytes(), c - first, bits, 1);
    IMG_TRY(storage.write(HostOffset((plan.first_block() + i) << header.cluster_bits), block.bytes()));
  }
  return {};
}

Result<> write_table(Storage& storage, const Header& header, const Plan& plan) {
  TableWriter table(storage, HostOffset(plan.table() << header.cluster_bits));
  uint64_t index = 0;
  for (size_t i = 0; i < plan.blocks.size(); ++i, ++index) {
    for (; index < plan.blocks[i]; ++index) IMG_TRY(table.entry(0));
    IMG_TRY(table.entry((plan.first_block() + i) << header.cluster_bits));
  }
  for (; index < plan.table_clusters * header.cluster_size() / 8; ++index) IMG_TRY(table.entry(0));
  return table.finish();
}

/// The refcount table's and the snapshot table's fields are neighbours in the first sector, so both switch at once.
Result<> switch_header(Storage& storage, const Header& header, const Plan& plan) {
  wire::Header raw;
  raw.refcount_table_offset = plan.table() << header.cluster_bits;
  raw.refcount_table_clusters = static_cast<uint32_t>(plan.table_clusters);
  raw.snapshot_count = header.snapshot_count;
  raw.snapshots_offset = plan.first << header.cluster_bits;
  constexpr size_t kRefcountFields = 12;
  constexpr size_t kWithSnapshots = 24;
  const ConstBytes fields = std::as_bytes(std::span(&raw, 1)).subspan(kRefcountTableField.bytes());
  return storage.write(kRefcountTableField, fields.first(plan.snapshot_clusters ? kWithSnapshots : kRefcountFields));
}

}  // namespace

Result<> rebuild_refcounts(Storage& storage, const Header& header, const RebuildInput& input) {
  std::vector<std::byte> snapshots;
  if (input.new_snapshots) snapshots = encode_snapshot_table(*input.new_snapshots);
  IMG_LET(const Plan plan, plan_structures(header, input, snapshots.size()));
  IMG_LET(const uint64_t size, storage.size());
  if (!storage.info().extensible && plan.end() > size >> header.cluster_bits)
    return fail(ErrorCode::no_space, "no room behind the image for {} clusters of new refcount structures",
                plan.end() - plan.first);

  snapshots.resize(plan.snapshot_clusters * header.cluster_size());
  if (!snapshots.empty()) IMG_TRY(storage.write(HostOffset(plan.first << header.cluster_bits), snapshots));
  IMG_TRY(write_blocks(storage, header, input, plan));
  IMG_TRY(storage.flush());
  IMG_TRY(write_table(storage, header, plan));
  IMG_TRY(storage.flush());
  IMG_TRY(switch_header(storage, header, plan));
  return storage.flush();
}

}  // namespace imgfuse::qcow2
