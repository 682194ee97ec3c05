// What formats whose images name other files have in common.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "base/math.h"
#include "imgfuse/disk.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"

namespace imgfuse {

/// Opens a file that an image names as its backing file, read-only. Called during open only; may give null, where the
/// chain is to end.
using BackingOpener =
    std::function<Result<std::unique_ptr<Disk>>(const std::string& name, const std::optional<std::string>& format)>;

/// Opens the external data file of an image, for writing if the image is. Called during open only, before
/// BackingOpener. The name is missing where the image has none.
using DataFileOpener = std::function<Result<std::shared_ptr<Storage>>(const std::optional<std::string>& name)>;

/// Formats that a backing file may have.
inline Result<> check_backing_format(const std::string& format) {
  if (format == "raw" || format == "qcow2" || format == "qed" || format == "fvd") return {};
  return fail(ErrorCode::invalid, "backing format {:?} is none of raw, qcow2, qed and fvd", format);
}

/// Reads from a backing file of `size` bytes, which may be null and shorter: zeros past its end.
inline Result<> read_below(Disk* backing, uint64_t size, GuestOffset offset, Bytes out) {
  const uint64_t there = offset.bytes() < size ? std::min(out.size(), size - offset.bytes()) : 0;
  if (there < out.size()) std::memset(out.data() + there, 0, out.size() - there);
  return there == 0 ? Result<>{} : backing->read(offset, out.first(there));
}

/// What a backing file holds at the front of a range.
struct BelowRun {
  uint64_t length = 0;  ///< bytes; whole units, but where the range ends
  bool zero = false;    ///< known to read as zeros
};

/// `range` begins inside the backing file, with a unit. A unit that has some data counts as data. Reads tables only.
inline Result<BelowRun> run_below(Disk& backing, uint64_t size, GuestRange range, uint64_t unit) {
  const uint64_t left = size - range.begin.bytes();
  IMG_LET(const std::vector<Extent> extents, backing.map({range.begin, std::min(range.length, left)}, 1));
  const uint64_t length = extents.front().range.length;
  const bool zero = extents.front().kind != ExtentKind::data;
  const bool whole = length >= std::min(range.length, left);
  const uint64_t units = zero && !whole ? round_down(length, unit) : round_up(length, unit);
  if (units == 0) return BelowRun{std::min(unit, range.length), false};
  return BelowRun{std::min(units, range.length), zero};
}

}  // namespace imgfuse
