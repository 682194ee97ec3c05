// OrderStorage: watches a driver write, and stops it at the first write that a crash could turn into damage.
#pragma once

#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "base/mutex.h"
#include "support/image_view.h"
#include "support/mem_storage.h"

namespace imgfuse::test {

/// Passes every call on. It keeps two views of the image, the durable one and the one with everything that was written,
/// and takes every mixture of them for possible. At each change it asserts:
///
///   I1  whatever is pointed at, in any mixture, has a durable count at least as high as its references
///   I2  a data cluster is written and flushed before an entry that shows it is written
///   I3  an L2 (or L1) table's first content is flushed before the pointer to it is written
///   I4  no cluster is written, discarded or linked for a new purpose while a possible pointer still uses it for
///       another; clusters shared with a snapshot are not written at all. Compressed streams share clusters with each
///       other, so for them it is their bytes that count, and those are not written at all either
///   I5  a count is lowered only after the un-mapping is durable
///   I6  a refcount block is flushed, and counted by what is durable or is switched with it, before its table entry
///   I9  a header sector that switches several tables at once is written when all else is durable, to a state that is
///       sound by itself; nothing is written between it and its flush
///
/// While the dirty bit of an image with lazy refcounts is durable, counts may say anything (I1, I5), and an entry may
/// show bytes that are not flushed where there are zeros without them, and the entry showed nothing before (I2, I3).
///
/// For QED, whose clusters count as having a count of one if the file reaches to their end: I1 to I4, and that the
/// durable header says NEED_CHECK while tables change.
///
/// Asleep while the image is no other image without damage (being created or repaired). Thread-safe.
class OrderStorage final : public Storage {
 public:
  /// Told what is wrong, in the thread whose call was wrong. By default it prints and aborts.
  using OnViolation = std::function<void(const std::string&)>;

  /// `image`: what `inner` holds.
  OrderStorage(std::shared_ptr<Storage> inner, const MemImage& image, OnViolation on_violation = {});
  explicit OrderStorage(const std::shared_ptr<MemStorage>& inner) : OrderStorage(inner, inner->image()) {}

  const StorageInfo& info() const override { return inner_->info(); }
  Result<uint64_t> size() override { return inner_->size(); }
  Result<> read(HostOffset offset, Bytes out) override { return inner_->read(offset, out); }
  using Storage::write;
  Result<> write(HostOffset offset, std::span<const ConstBytes> parts) override;
  Result<> write_zeroes(HostRange range) override;
  Result<> discard(HostRange range) override;
  Result<> allocate(HostRange range) override { return inner_->allocate(range); }
  Result<> flush() override;
  Result<> resize(uint64_t size) override;
  Result<StorageExtent> extent(HostRange range) override { return inner_->extent(range); }
  Result<uint64_t> allocated() override { return inner_->allocated(); }

 private:
  struct Change {
    uint64_t number = 0;
    uint64_t offset = 0;
    uint64_t length = 0;
    bool is_write = true;         // otherwise zeros
    std::vector<std::byte> data;  // (write)
    bool returned = false;
    std::optional<uint64_t> new_size = {};  // of the file
  };
  using Changes = std::list<Change>;
  /// The first change that filled a part of a cluster since nobody could see what it holds.
  struct Fill {
    uint64_t change = 0;  // its number; 0: durable
    bool shown = false;   // something shows it
    bool kept = false;    // its cluster has an owner, for whom it is zeros
  };
  /// A count that becomes durable together with the pointer to what it counts.
  struct Switched {
    uint64_t change = 0;  // its number
    uint64_t count = 0;
  };

  template <class Call>
  Result<> make(Change change, bool discards, Call call);
  static void apply(const Change& change, MemImage& image);
  void check_targets(const Change& change, bool discards) REQUIRES(mutex_);
  void note_fills(const Change& change) REQUIRES(mutex_);
  bool touches_metadata(const Change& change) const REQUIRES(mutex_);
  void check_metadata(const Change& change) REQUIRES(mutex_);
  bool switches_tables(const Change& change) const REQUIRES(mutex_);
  void check_switch() REQUIRES(mutex_);
  void check_refcount_table(const Change& change) REQUIRES(mutex_);
  void check_counts() REQUIRES(mutex_);
  void check_shown(const Reference& reference) REQUIRES(mutex_);
  void check_stream_shown(const Reference& reference) REQUIRES(mutex_);
  void check_shown(const Reference& reference, uint64_t part) REQUIRES(mutex_);
  bool may_show_early(const Reference& reference, uint64_t part) const REQUIRES(mutex_);
  bool is_empty_table(const Reference& reference, uint64_t part) const REQUIRES(mutex_);
  void give_up(Changes::iterator change, std::vector<std::byte> left, uint64_t size) REQUIRES(mutex_);
  void start_epoch() REQUIRES(mutex_);
  void keep_overwritten() REQUIRES(mutex_);
  bool shows(uint64_t part) const REQUIRES(mutex_);
  bool has_owner(uint64_t part) const REQUIRES(mutex_);
  template <class F>
  void for_each_possible(uint64_t cluster, F f) const REQUIRES(mutex_);
  void violation(const std::string& text) const;

  const std::shared_ptr<Storage> inner_;
  const OnViolation on_violation_;

  Mutex mutex_;
  uint64_t last_number_ GUARDED_BY(mutex_) = 0;
  MemImage durable_ GUARDED_BY(mutex_);
  MemImage current_ GUARDED_BY(mutex_);
  Changes pending_ GUARDED_BY(mutex_);                        // not durable for sure, in the order of their calls
  bool tables_may_change_ GUARDED_BY(mutex_) = false;         // the durable header says so
  bool switching_ GUARDED_BY(mutex_) = false;                 // between a switch of tables and its flush
  std::shared_ptr<const ImageView> view_ GUARDED_BY(mutex_);  // of current_; null: asleep
  bool postponed_ GUARDED_BY(mutex_) = false;                 // no crash leaves an image whose counts are believed
  bool shows_zeros_ GUARDED_BY(mutex_) = false;               // whatever a crash leaves, it may show zeros
  std::vector<Reference> possible_ GUARDED_BY(mutex_);     // of durable_, and of current_ since the last flush; sorted
  std::map<uint64_t, uint64_t> least_ GUARDED_BY(mutex_);  // lowest count that a crash may leave
  std::map<uint64_t, Switched> switched_ GUARDED_BY(mutex_);  // by cluster, until that change is durable
  std::map<uint64_t, Fill> fills_ GUARDED_BY(mutex_);         // by part: cluster times parts of a cluster
  /// By part: the number of the first change since the last flush, and before it, that filled what something shows.
  std::map<uint64_t, uint64_t> overwritten_ GUARDED_BY(mutex_), overwritten_before_ GUARDED_BY(mutex_);
};

}  // namespace imgfuse::test
