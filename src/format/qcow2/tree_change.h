// A change of the trees (an L1 table with all that it leads to) of an image, made real by one write to the header.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "format/qcow2/allocator.h"
#include "format/qcow2/count_window.h"
#include "format/qcow2/image.h"
#include "format/qcow2/l2_entry.h"
#include "format/qcow2/refcounts.h"

namespace imgfuse::qcow2 {

using L1Table = std::vector<uint64_t>;

/// Prepares, behind everything that is reachable, what the image is to become: a new active L1 table, copies of the L2
/// tables whose COPIED flags change, copies of the refcount blocks whose counts change, and a new refcount table. When
/// it is all durable, the caller switches the header, which has every pointer to it in one sector. So a crash leaves
/// the state before or the state after, flags and counts included, and an error before the switch costs nothing.
///
///   examine()   reads only; finds damage and counts that would overflow
///   reserve()   clusters for all of it; then the caller writes everything out that is dirty
///   write()     tables and blocks
///   … barrier, header, barrier: the caller's …
///   adopt()     in memory; what was replaced goes to quarantine
///
/// The caller has the whole disk to itself, from before examine() to behind adopt(), so that no count changes besides.
class TreeChange {
 public:
  struct Gain {
    const L1Table* tree = nullptr;
    int32_t references = 0;  ///< that everything in the tree gains, or loses
  };
  /// What the COPIED flags of the next active tree are to be.
  enum class Flags {
    none,     ///< a snapshot has the same tree
    recount,  ///< set where one reference is left
  };
  struct Plan {
    std::vector<Gain> gains;
    const L1Table* next = nullptr;  ///< of the tree that becomes the active one
    Flags flags = Flags::none;
    uint64_t snapshot_table_bytes = 0;
  };

  TreeChange(Image& image, Refcounts& refcounts, Allocator& allocator, Plan plan)
      : image_(image), refcounts_(refcounts), allocator_(allocator), plan_(std::move(plan)) {}

  Result<> examine();
  Result<> reserve();
  Result<> write();
  /// Gives host space of clusters back that have no reference any more. Behind the switch only.
  Result<> punch();
  /// Under Image::mutex, exclusive. What the L1 and the snapshot table gave up is the caller's to free.
  void adopt();
  /// The clusters stay counted, whatever happens: nobody knows which header is the durable one.
  void commit();

  const L1Table& l1() const { return l1_; }
  HostOffset l1_offset() const { return l1_place_.front().host(); }
  HostOffset snapshot_table_offset() const {
    return snapshot_table_place_.empty() ? HostOffset(0) : snapshot_table_place_.front().host();
  }
  HostOffset refcount_table_offset() const { return refcount_table_place_.front().host(); }
  uint64_t refcount_table_clusters() const { return refcount_table_clusters_; }
  /// Clusters of the next tree that hold host space.
  uint64_t allocated_clusters() const { return allocated_clusters_; }

 private:
  using Reservations = std::vector<Reservation>;
  class Supply;

  Result<> check_tables(const L1Table& tree) const;
  Result<> for_each_window(const std::function<Result<>()>& visit);
  Result<> load_window(uint64_t first);
  Result<> add_tree(const Gain& gain);
  Result<> add_table(const Gain& gain, uint64_t l1_index, ConstBytes table);
  uint64_t run_length(ConstBytes table, uint64_t index, L2Entry first) const;
  Result<> add_run(const Gain& gain, L2Entry first, uint64_t entries, GuestOffset guest);
  Result<> add(uint64_t cluster, uint64_t count, int32_t references);
  Result<> check_counts();
  Result<> check_block(uint64_t block, ConstBytes counts);
  Result<> check_count(uint64_t cluster, uint64_t count) const;
  Result<> find_changed_tables();
  void touch(uint64_t cluster) { touched_[cluster >> block_bits_] = true; }
  bool is_counted(uint64_t cluster) const { return cluster < end_ && blocks_[cluster >> block_bits_] != 0; }
  uint64_t touched_place(uint64_t block) const { return touched_[block] ? blocks_[block] : 0; }

  Result<Reservations> reserve_run(uint64_t clusters);
  Result<> write_blocks();
  Result<> write_tables(bool first);
  Result<> write_table(HostOffset offset, const std::vector<uint64_t>& entries);
  bool flag_for(L2Entry entry) const;

  Image& image_;
  Refcounts& refcounts_;
  Allocator& allocator_;
  const Plan plan_;

  uint64_t end_ = 0;  // clusters from here on have no count
  unsigned block_bits_ = 0;
  uint64_t windows_ = 0;
  CountWindow window_;
  std::vector<uint64_t> blocks_;      // refcount blocks as they are
  std::vector<bool> touched_;         // blocks of which a count changes
  std::vector<bool> changed_tables_;  // of the next tree: flags change, so that it gets a copy
  uint64_t allocated_clusters_ = 0;

  Reservations copies_;  // for tables and blocks
  Reservations l1_place_, snapshot_table_place_, refcount_table_place_;
  uint64_t refcount_table_clusters_ = 0;
  L1Table l1_;                            // next
  std::vector<uint64_t> refcount_table_;  // next
};

}  // namespace imgfuse::qcow2
