// Host clusters: finding free ones, and giving back those that are no longer referenced.
#pragma once

#include <utility>
#include <vector>

#include "base/latch.h"
#include "format/qcow2/image.h"
#include "format/qcow2/refcounts.h"

namespace imgfuse::qcow2 {

class Allocator;

/// Host clusters that are counted as used but that nothing points at yet. Destroyed without commit(), they are free
/// again at once.
class [[nodiscard]] Reservation {
 public:
  Reservation() = default;
  Reservation(Reservation&& other) noexcept { *this = std::move(other); }
  Reservation& operator=(Reservation&& other) noexcept;
  ~Reservation();

  HostOffset host() const { return host_; }
  uint64_t clusters() const { return clusters_; }
  /// The clusters lie past everything that was written: they read as zeros on the host.
  bool fresh() const { return fresh_; }
  /// Fresh, and within what is durable of the file: a crash leaves them as zeros until something is written there.
  bool blank() const { return blank_; }
  /// Clusters that are not counted: in a data file each guest cluster has its place.
  static Reservation fixed(HostOffset host, uint64_t clusters) {
    Reservation reservation;
    reservation.host_ = host;
    reservation.clusters_ = clusters;
    return reservation;
  }
  /// Something points at them from here on.
  void commit() { allocator_ = nullptr; }

 private:
  friend class Allocator;
  Allocator* allocator_ = nullptr;
  Refcounts::Slice slice_;
  HostOffset host_;
  uint64_t clusters_ = 0;
  bool fresh_ = false;
  bool blank_ = false;
};

/// What becomes of the host space of freed clusters.
enum class HostSpace { keep, punch };

/// A run of clusters of which one reference each was given up.
struct FreedClusters {
  uint64_t first = 0;
  uint64_t count = 0;
  HostSpace space = HostSpace::keep;
};

/// First fit from the lowest cluster that may be free. A count is raised in memory before its cluster is used. It is
/// lowered only by release(), when the un-mapping is durable (I5): until then freed clusters wait in quarantine.
///
/// Any thread may call. reserve() runs one search at a time (rank 3, held across the I/O that loads or makes a
/// refcount block).
class Allocator {
 public:
  Allocator(Image& image, Refcounts& refcounts, Latch& latch) : image_(image), refcounts_(refcounts), latch_(latch) {}

  /// `file_size`: where the image file ends when it is opened; past it everything reads as zeros.
  void start(uint64_t file_size);
  /// From here on the file is made longer ahead of what is reserved, with a hole, so that clusters can be blank. Only
  /// where all clusters come from reserve() and reserve_contiguous().
  void stay_ahead() EXCLUDES(search_);
  /// Before a flush cycle, after stay_ahead(): where guests allocate, counts clusters at the end of the file that later
  /// cycles then need not count. Blocks.
  void count_ahead() EXCLUDES(search_);
  /// Neighbouring clusters.
  struct Run {
    uint64_t first = 0;
    uint64_t end = 0;
    bool empty() const { return first == end; }
    uint64_t count() const { return end - first; }
  };
  /// What count_ahead() has counted, at a flush cycle's cut. Under Image::mutex, exclusive.
  Run counting() const;
  /// The cycle is durable: reserve() may hand these out.
  void counts_durable(Run run) EXCLUDES(image_.mutex);
  /// Between these, count_ahead() does nothing.
  void pause_counts_ahead() EXCLUDES(search_);
  void resume_counts_ahead() EXCLUDES(search_);
  /// Takes back what count_ahead() did; the next cycle writes it. Paused. Blocks.
  Result<> give_back_counts() EXCLUDES(search_);
  /// A flush has covered the file's length, which was this before.
  void durable_to(uint64_t file_size) EXCLUDES(image_.mutex);
  /// Cuts off what stay_ahead() has added and nobody has used. No request may run. Blocks.
  Result<> cut_ahead() EXCLUDES(search_);
  /// Puts refcount blocks at the end that count nothing into quarantine; false if there are none. No request may run,
  /// and nothing may be dirty or in quarantine. Blocks.
  Result<bool> drop_empty_blocks() EXCLUDES(search_);
  /// The file ends, durably, behind the last cluster that is counted. As drop_empty_blocks().
  Result<> cut_end() EXCLUDES(search_);

  /// Up to `wanted` contiguous clusters, at least one. Blocks.
  Result<Reservation> reserve(uint64_t wanted) EXCLUDES(search_);
  /// Exactly `count` contiguous clusters at the end of the image, for a table. Blocks.
  Result<std::vector<Reservation>> reserve_contiguous(uint64_t count) EXCLUDES(search_);

  /// Takes one certain cluster if it is free and below `limit`. `slice` has its count. Under Image::mutex, exclusive.
  bool take(const Refcounts::Slice& slice, uint64_t cluster, uint64_t limit);
  /// Gives back one reference that was never reachable. Under Image::mutex, exclusive.
  void cancel(const Refcounts::Slice& slice, uint64_t cluster);
  /// No cluster from here on can be had.
  Result<uint64_t> end_limit();

  /// Puts one reference of each cluster into quarantine. Under Image::mutex, exclusive: the same hold of the lock in
  /// which the pointer to it was removed.
  void quarantine(HostOffset host, uint64_t clusters, HostSpace space);

  /// Clusters may have become free anywhere: the next search looks for them. Under Image::mutex, exclusive.
  void search_from_start();

  using Freed = std::vector<FreedClusters>;
  /// Takes what is in quarantine, at a flush cycle's cut. Under Image::mutex, exclusive.
  Freed take_quarantine();
  /// Gives back what a durable flush cycle un-mapped: punches holes, then lowers counts. Blocks. One thread at a time.
  Result<> release(Freed freed);
  /// Puts it back into quarantine: the cycle failed.
  void keep(Freed freed);

  bool wants_flush() const EXCLUDES(image_.mutex);
  bool has_quarantine() const EXCLUDES(image_.mutex);
  /// Clusters in it.
  uint64_t quarantined() const EXCLUDES(image_.mutex);

 private:
  friend class Reservation;
  Result<Reservation> search(uint64_t from, uint64_t wanted, uint64_t limit) REQUIRES(search_);
  Result<Reservation> take_counted(uint64_t wanted) REQUIRES(search_);
  tl::unexpected<Error> no_cluster_below(uint64_t limit) const;
  Result<Reservation> try_slice(const Refcounts::Slice& slice, uint64_t from, uint64_t wanted, uint64_t limit)
      EXCLUDES(image_.mutex);
  template <class Make>
  Result<uint64_t> make_blocks(Make make) REQUIRES(search_);
  Result<uint64_t> create_block(uint64_t cluster) REQUIRES(search_);
  void extend(uint64_t end) REQUIRES(search_);
  Run countable() EXCLUDES(image_.mutex);
  bool may_count_ahead() EXCLUDES(search_);
  Result<> count_run(Run run) REQUIRES(search_);
  void cancel(Reservation& reservation) EXCLUDES(image_.mutex);
  void lower(const Refcounts::Slice& slice, uint64_t cluster) REQUIRES(image_.mutex);

  Image& image_;
  Refcounts& refcounts_;
  Latch& latch_;

  Mutex search_{LockRank::search};
  bool ahead_ GUARDED_BY(search_) = false;
  uint64_t extended_to_ GUARDED_BY(search_) = 0;         // cluster; 0: never
  unsigned paused_ GUARDED_BY(search_) = 0;              // calls of pause_counts_ahead()
  bool has_allocated_ GUARDED_BY(image_.mutex) = false;  // before an earlier flush
  Run counting_ GUARDED_BY(image_.mutex);                // counted ahead, but not durably yet
  Run counted_ GUARDED_BY(image_.mutex);                 // and durably; in front of counting_
  uint64_t lowest_free_ GUARDED_BY(image_.mutex) = 1;    // no cluster below is free
  uint64_t fresh_from_ GUARDED_BY(image_.mutex) = 1;     // clusters from here on read as zeros on the host
  uint64_t durable_end_ GUARDED_BY(image_.mutex) = 0;    // a crash leaves the file with all clusters below
  std::vector<FreedClusters> quarantine_ GUARDED_BY(image_.mutex);
  uint64_t quarantined_ GUARDED_BY(image_.mutex) = 0;  // clusters in quarantine_
  bool releasing_ GUARDED_BY(image_.mutex) = false;    // a flush cycle has taken some out to free them
};

}  // namespace imgfuse::qcow2
