// How large a new image would be.
#include <algorithm>

#include "base/math.h"
#include "imgfuse/bitmaps.h"
#include "imgfuse/job.h"
#include "job/pairs.h"

namespace imgfuse {
namespace {

constexpr uint64_t kSector = 512;
constexpr uint64_t kMaxL1Bytes = 32_MiB;

/// The parts of a qcow2 image, in bytes. Every cluster has a reference count, those of the counts themselves included.
class Qcow2Size {
 public:
  Qcow2Size(uint64_t virtual_size, const CreateOptions& options)
      : cluster_(options.cluster_size), data_(round_up(virtual_size, cluster_)) {
    const uint64_t entry = options.extended_l2 ? 16 : 8;
    const uint64_t l2 = round_up(data_ / cluster_ * entry, cluster_);
    const uint64_t l1 = round_up(l2 / cluster_ * 8, cluster_);
    const uint64_t counted = cluster_ + l1 + l2 + data_;  // the first cluster is the header's
    metadata_ = cluster_ + l1 + l2 + refcounts(counted / cluster_, options.refcount_bits) * cluster_;
  }
  uint64_t data() const { return data_; }
  uint64_t metadata() const { return metadata_; }

 private:
  /// Clusters of refcount blocks and of their table: more of them need more of them, until it is enough.
  uint64_t refcounts(uint64_t counted, uint32_t bits) const {
    const uint64_t per_block = cluster_ * 8 / bits;
    uint64_t blocks = 0, table = 0;
    for (;;) {
      const uint64_t more_blocks = divide_up(counted + blocks + table, per_block);
      const uint64_t more_table = divide_up(more_blocks * 8, cluster_);
      if (more_blocks == blocks && more_table == table) return blocks + table;
      blocks = more_blocks;
      table = more_table;
    }
  }

  const uint64_t cluster_;
  const uint64_t data_;
  uint64_t metadata_ = 0;
};

/// Clusters of the target that hold some of the source's data.
Result<uint64_t> data_clusters(Disk& source, uint64_t cluster) {
  uint64_t clusters = 0;
  GuestOffset next;  // clusters before it are counted
  for (GuestRange rest{GuestOffset(0), source.size()}; !rest.empty();) {
    IMG_LET(const std::vector<Extent> extents, source.map(rest));
    for (const Extent& extent : extents) {
      if (extent.kind != ExtentKind::data || extent.range.end() <= next) continue;
      const uint64_t begin = round_down(std::max(extent.range.begin, next).bytes(), cluster);
      const uint64_t end = round_up(extent.range.end().bytes(), cluster);
      clusters += (end - begin) / cluster;
      next = GuestOffset(end);
    }
    const GuestOffset known = extents.back().range.end();
    rest = {known, rest.end() - known};
  }
  return clusters;
}

/// Each bitmap has data, a table of it, and an entry in one directory.
uint64_t bitmaps_size(const std::vector<BitmapInfo>& bitmaps, uint64_t disk_size, uint64_t cluster) {
  uint64_t size = 0, directory = 0;
  for (const BitmapInfo& bitmap : bitmaps) {
    const uint64_t data = round_up(divide_up(divide_up(disk_size, bitmap.granularity), 8), cluster);
    size += data + round_up(data / cluster * 8, cluster);
    directory += round_up(24 + bitmap.name.size(), 8);
  }
  return size + round_up(directory, cluster);
}

bool takes_all_space(Preallocation preallocation) {
  return preallocation == Preallocation::falloc || preallocation == Preallocation::full;
}

Result<> check_geometry(uint64_t size, const CreateOptions& target) {
  const uint64_t cluster = target.cluster_size;
  if (!is_power_of_two(cluster) || cluster < 512 || cluster > 2_MiB)
    return fail(ErrorCode::invalid, "cluster size {} is not a power of two between 512 and 2 MiB", cluster);
  if (!is_power_of_two(target.refcount_bits) || target.refcount_bits > 64)
    return fail(ErrorCode::invalid, "{} refcount bits are not a power of two between 1 and 64", target.refcount_bits);
  const uint64_t l2_entries = cluster / (target.extended_l2 ? 16 : 8);
  if (divide_up(size, l2_entries * cluster) > kMaxL1Bytes / 8)
    return fail(ErrorCode::invalid, "a disk of {} bytes is too large for clusters of {}", size, cluster);
  return {};
}

Result<Measurement> measure_qcow2(Disk* source, uint64_t size, const CreateOptions& target) {
  IMG_TRY(check_geometry(size, target));
  const Qcow2Size parts(size, target);
  Measurement measurement{.fully_allocated = parts.metadata() + parts.data()};
  uint64_t data = 0;
  if (takes_all_space(target.preallocation) || (source && target.backing_file)) {
    data = parts.data();  // how much of it the backing file spares cannot be told
  } else if (source) {
    IMG_LET(const uint64_t clusters, data_clusters(*source, target.cluster_size));
    data = clusters * target.cluster_size;
  }
  measurement.required = parts.metadata() + data;
  if (source && source->info().format == "qcow2" && target.version >= 3) {
    Bitmaps* bitmaps = source->bitmaps();
    measurement.bitmaps = bitmaps ? bitmaps_size(bitmaps->list(), size, target.cluster_size) : 0;
  }
  return measurement;
}

/// Header, L1 table, and the L2 tables of stretches that hold data.
Result<Measurement> measure_qed(Disk* source, uint64_t size, const CreateOptions& target) {
  const uint64_t cluster = target.cluster_size;
  const uint32_t table_size = target.table_size.value_or(4);
  if (!is_power_of_two(cluster) || cluster < 4_KiB || cluster > 64_MiB || !is_power_of_two(table_size) ||
      table_size > 16)
    return fail(ErrorCode::invalid, "there are no QED images with clusters of {} bytes and {} of them to a table",
                cluster, table_size);
  const uint64_t table = cluster * table_size;
  const uint64_t coverage = table / 8 * cluster;
  if (size > uint64_t{INT64_MAX} - table || size / coverage >= table / 8)
    return fail(ErrorCode::invalid,
                "a disk of {} bytes is too large for clusters of {} bytes and {} of them to a table", size, cluster,
                table_size);
  const uint64_t header = cluster + table;
  const uint64_t all = round_up(size, cluster);
  Measurement measurement{.required = header, .fully_allocated = header + divide_up(size, coverage) * table + all};
  if (source && target.backing_file) {
    measurement.required = measurement.fully_allocated;
  } else if (source) {
    IMG_LET(const uint64_t clusters, data_clusters(*source, cluster));
    IMG_LET(const uint64_t tables, data_clusters(*source, coverage));
    measurement.required += clusters * cluster + tables * table;
  }
  return measurement;
}

/// Header, bitmap, table and journal, and the chunks that hold data.
Result<Measurement> measure_fvd(Disk* source, uint64_t size, const CreateOptions& target) {
  constexpr uint64_t kPage = 4096, kHeader = 8192, kDefaultJournal = 16_MiB, kEntriesPerSector = 121;
  const FvdCreateOptions& fvd = target.fvd;
  const uint64_t chunk = round_up(fvd.chunk_size, kPage);
  if (fvd.chunk_size == 0 || fvd.chunk_size >> 40 || fvd.block_size.value_or(kSector) == 0)
    return fail(ErrorCode::invalid, "there are no FVD images with chunks of {} bytes and blocks of {}", fvd.chunk_size,
                fvd.block_size.value_or(kSector));
  const uint64_t chunks = fvd.compact ? divide_up(size, chunk) : 0;
  uint64_t metadata = kHeader + round_up(chunks * 4, kPage);
  if (target.backing_file) {
    uint64_t block = round_up(fvd.block_size.value_or(kSector), kSector);
    while (!fvd.block_size && divide_up(divide_up(size, block), 8) > 4_MiB) block *= 2;
    metadata += round_up(divide_up(divide_up(size, block), 8), kPage);
  }
  if (fvd.journal && (fvd.compact || target.backing_file))
    metadata += round_up(
        std::max(fvd.journal_size.value_or(kDefaultJournal), divide_up(chunks, kEntriesPerSector) * kSector), kPage);
  Measurement measurement{.required = metadata, .fully_allocated = metadata + (fvd.compact ? chunks * chunk : size)};
  if (!fvd.compact || (source && target.backing_file)) {
    measurement.required = measurement.fully_allocated;
  } else if (source) {
    IMG_LET(const uint64_t used, data_clusters(*source, chunk));
    measurement.required += used * chunk;
  }
  return measurement;
}

}  // namespace

Result<Measurement> measure(Disk* source, const CreateOptions& target) {
  if (!source && !target.size) return fail(ErrorCode::invalid, "neither an image nor a size is given");
  const uint64_t size = source ? source->size() : *target.size;
  if (target.format == "qcow2") return measure_qcow2(source, size, target);
  if (target.format == "qed") return measure_qed(source, size, target);
  if (target.format == "fvd") return measure_fvd(source, size, target);
  if (target.format != "raw")
    return fail(ErrorCode::unsupported, "format {} cannot be measured; raw, qcow2, qed and fvd can", target.format);
  // Holes count: a raw file is as long as its disk.
  return Measurement{.required = round_up(size, kSector), .fully_allocated = round_up(size, kSector), .bitmaps = {}};
}

}  // namespace imgfuse
