// Storage: bytes in a host object. It knows no guest and no format.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "imgfuse/error.h"
#include "imgfuse/units.h"

namespace imgfuse {

using Bytes = std::span<std::byte>;
using ConstBytes = std::span<const std::byte>;

struct StorageInfo {
  std::string name;  ///< for messages, as the user gave it
  bool writable = false;
  bool extensible = false;  ///< writes past the end grow it, and the gap reads as zeros (a file, not a block device)
};

/// Whether a host range holds data or a hole, as far as the host tells.
struct StorageExtent {
  uint64_t length = 0;
  bool data = true;
};

/// The host object an image or a data file lies in.
///
/// Threads: any thread may call anything at any time; calls on overlapping ranges are ordered by the caller.
/// All calls may block. Reads past the end give zeros; writes past the end grow an extensible storage.
/// A write that has returned is visible to later reads; only flush() makes it durable, and a flush covers exactly
/// the writes that had returned before it was called.
class Storage {
 public:
  virtual ~Storage() = default;

  virtual const StorageInfo& info() const = 0;
  /// The end of the host object in bytes.
  virtual Result<uint64_t> size() = 0;

  virtual Result<> read(HostOffset offset, Bytes out) = 0;
  /// Writes the parts one behind the other, starting at `offset`, in as few host calls as there can be.
  virtual Result<> write(HostOffset offset, std::span<const ConstBytes> parts) = 0;
  Result<> write(HostOffset offset, ConstBytes data) { return write(offset, std::array{data}); }
  /// The range reads as zeros afterwards; it may stay allocated on the host. Grows an extensible storage.
  virtual Result<> write_zeroes(HostRange range) = 0;
  /// Gives host space back where that is possible. The range reads as zeros or as before. Never grows.
  virtual Result<> discard(HostRange range) = 0;
  /// Reserves host space for the range without changing what it reads as. Grows an extensible storage.
  virtual Result<> allocate(HostRange range) = 0;
  virtual Result<> flush() = 0;
  virtual Result<> resize(uint64_t size) = 0;
  /// The longest run at the front of the range that is all data or all hole. `range` is not empty.
  virtual Result<StorageExtent> extent(HostRange range) = 0;
  /// Host space in use, in bytes (st_blocks).
  virtual Result<uint64_t> allocated() = 0;
  /// The descriptor of the host file, for somebody who reads and writes it himself until this object ends; -1: there
  /// is none. From then on every flush reaches the host.
  virtual int share_file() { return -1; }
};

}  // namespace imgfuse
