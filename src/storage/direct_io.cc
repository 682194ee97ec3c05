#include "storage/direct_io.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cassert>
#include <cstring>

#include "base/buffer.h"
#include "base/log.h"
#include "base/math.h"

namespace imgfuse {
namespace {

Bytes bounce(size_t length) {
  thread_local Buffer buffer;
  assert(length <= DirectIo::kWindow);
  buffer.reserve(length);
  return buffer.bytes().first(length);
}

/// Copies the next bytes of a list of parts, call by call.
class PartReader {
 public:
  explicit PartReader(std::span<const ConstBytes> parts) : parts_(parts) {}
  void copy_to(Bytes out) {
    while (!out.empty()) {
      const ConstBytes rest = parts_.front().subspan(used_);
      const size_t n = std::min(rest.size(), out.size());
      if (n != 0) std::memcpy(out.data(), rest.data(), n);
      out = out.subspan(n);
      used_ += n;
      if (used_ < parts_.front().size()) continue;
      parts_ = parts_.subspan(1);
      used_ = 0;
    }
  }

 private:
  std::span<const ConstBytes> parts_;
  size_t used_ = 0;  // of the first part
};

DirectAlignment host_alignment(int fd) {
  struct ::statx status {};
  const bool known = statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 && (status.stx_mask & STATX_DIOALIGN) &&
                     status.stx_dio_offset_align != 0;
  if (!known) return {};
  return {std::max(status.stx_dio_mem_align, uint32_t{1}), status.stx_dio_offset_align};
}

}  // namespace

Result<DirectAlignment> DirectIo::enable(HostFile& file) {
  if (!file.set_direct(true))
    return fail(ErrorCode::unsupported, "its file system has no O_DIRECT; open it with --cache=writeback");
  const DirectAlignment alignment = host_alignment(file.fd());
  if (!is_power_of_two(alignment.block) || alignment.block > kWindow || alignment.memory > kBufferAlignment)
    return fail(ErrorCode::unsupported, "its file system asks for O_DIRECT in blocks of {} bytes", alignment.block);
  file.set_block(alignment.block);
  return alignment;
}

bool DirectIo::aligned(ConstBytes bytes) const {
  return reinterpret_cast<uintptr_t>(bytes.data()) % alignment_.memory == 0 && bytes.size() % alignment_.block == 0;
}

Result<> DirectIo::read(uint64_t offset, Bytes out) {
  if (aligned(offset) && aligned(out)) return file_.read(offset, out);

  const uint64_t end = offset + out.size();
  while (offset < end) {
    const uint64_t at = round_down(offset, alignment_.block);
    const Bytes window = bounce(std::min<uint64_t>(kWindow, round_up(end, alignment_.block) - at));
    IMG_TRY(file_.read(at, window));
    const ConstBytes wanted = window.subspan(offset - at, std::min(end, at + window.size()) - offset);
    std::copy(wanted.begin(), wanted.end(), out.begin());
    out = out.subspan(wanted.size());
    offset += wanted.size();
  }
  return {};
}

Result<> DirectIo::write(uint64_t offset, std::span<const ConstBytes> parts) {
  uint64_t end = offset;
  for (const ConstBytes& part : parts) end += part.size();

  if (!aligned(offset) || !aligned(end)) {
    ExclusiveLock lock(blocks_);
    return write_windows(offset, end, parts);
  }
  SharedLock lock(blocks_);
  if (std::all_of(parts.begin(), parts.end(), [this](ConstBytes part) { return aligned(part); }))
    return file_.write(offset, parts);
  return write_windows(offset, end, parts);
}

Result<> DirectIo::write_windows(uint64_t offset, uint64_t end, std::span<const ConstBytes> parts) {
  const uint64_t block = alignment_.block;
  PartReader reader(parts);
  while (offset < end) {
    const uint64_t at = round_down(offset, block);
    const Bytes window = bounce(std::min<uint64_t>(kWindow, round_up(end, block) - at));
    const uint64_t stop = std::min(end, at + window.size());

    if (at < offset) IMG_TRY(file_.read(at, window.first(block)));
    const bool last_is_loaded = at < offset && window.size() == block;
    if (!aligned(stop) && !last_is_loaded) IMG_TRY(file_.read(at + window.size() - block, window.last(block)));
    reader.copy_to(window.subspan(offset - at, stop - offset));

    IMG_TRY(write_window(at, window, offset, stop));
    offset = stop;
  }
  return {};
}

/// Writes the whole blocks at `at`, of which [offset, end) has changed, without making the file longer than `end`.
Result<> DirectIo::write_window(uint64_t at, Bytes window, uint64_t offset, uint64_t end) {
  const uint64_t stop = at + window.size();
  if (stop == end || stop <= file_.end()) return file_.write(at, std::array{ConstBytes(window)});

  const uint64_t tail = round_down(end, alignment_.block);
  if (at < tail) IMG_TRY(file_.write(at, std::array{ConstBytes(window.first(tail - at))}));
  const uint64_t from = std::max(offset, tail);
  file_.set_direct(false);
  auto result = file_.write(from, std::array{ConstBytes(window.subspan(from - at, end - from))});
  if (!file_.set_direct(true)) log_error("{}: O_DIRECT cannot be switched on again", file_.name());
  return result;
}

}  // namespace imgfuse
