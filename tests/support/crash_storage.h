// CrashStorage: a host file of which a power cut may leave any mixture of what was not flushed.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "base/mutex.h"
#include "support/mem_storage.h"
#include "support/random.h"

namespace imgfuse::test {

/// What a crash leaves of the changes since the last flush.
enum class CrashMode {
  none,         ///< S: nothing; a flush just returned and nothing newer arrived
  all,          ///< p: all of them, up to this moment
  newest,       ///< o: only the newest
  one_missing,  ///< d: all but one
  random,       ///< r: any subset
  torn,         ///< t: any subset, each write in any subset of its sectors
};
inline constexpr CrashMode kCrashModes[] = {CrashMode::none,        CrashMode::all,    CrashMode::newest,
                                            CrashMode::one_missing, CrashMode::random, CrashMode::torn};

/// A writable, extensible Storage in memory that keeps the changes since the last flush apart, in order. A flush makes
/// durable exactly the changes that had returned before it was called. Like a page cache it writes whole sectors: a
/// change that begins or ends inside a sector takes the rest of the sector with it. Thread-safe.
class CrashStorage final : public Storage {
 public:
  static constexpr uint64_t kSector = 512;

  explicit CrashStorage(MemImage durable = {});

  /// Called after every change and every flush, in the thread that made it, without any lock: the place to crash.
  void set_observer(std::function<void()> observer) { observer_ = std::move(observer); }

  /// Number of changes that a crash may or may not leave.
  size_t pending() const EXCLUDES(mutex_);
  MemImage crash(CrashMode mode, Rng& rng) const EXCLUDES(mutex_);
  /// Applies the i-th pending change where bit i of `chosen` is set: for trying all subsets of a few.
  MemImage crash(uint64_t chosen) const EXCLUDES(mutex_);
  MemImage image() const EXCLUDES(mutex_);

  const StorageInfo& info() const override { return info_; }
  Result<uint64_t> size() override;
  Result<> read(HostOffset offset, Bytes out) override;
  using Storage::write;
  Result<> write(HostOffset offset, std::span<const ConstBytes> parts) override;
  Result<> write_zeroes(HostRange range) override;
  Result<> discard(HostRange range) override;
  Result<> allocate(HostRange range) override;
  Result<> flush() override;
  Result<> resize(uint64_t size) override;
  Result<StorageExtent> extent(HostRange range) override;
  Result<uint64_t> allocated() override;

 private:
  struct Change {
    enum class Kind { write, zero, resize } kind;
    uint64_t offset = 0;
    uint64_t length = 0;          // resize: the new size
    uint64_t grows_to = 0;        // the file ends here at least
    std::vector<std::byte> data;  // write: whole sectors
  };
  static void apply(const Change& change, MemImage& image);
  static void apply_torn(const Change& change, MemImage& image, Rng& rng);
  Change whole_sectors(uint64_t offset, const std::vector<std::byte>& data) const REQUIRES(mutex_);
  Result<> add(Change change) REQUIRES(mutex_);
  void observe() const;

  const StorageInfo info_{.name = "memory", .writable = true, .extensible = true};
  std::function<void()> observer_;

  mutable Mutex mutex_;
  MemImage durable_ GUARDED_BY(mutex_);
  MemImage current_ GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<const Change>> pending_ GUARDED_BY(mutex_);  // in the order of their calls
};

}  // namespace imgfuse::test
