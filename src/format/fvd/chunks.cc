#include "format/fvd/chunks.h"

#include <algorithm>

#include "core/host_space.h"

namespace imgfuse::fvd {
namespace {

constexpr uint64_t kSmallestGrowUnit = uint64_t{1} << 20;

/// Data begin below 2^62.
constexpr uint64_t kMaxReach = uint64_t{1} << 62;

void survey_bits(const std::vector<uint32_t>& table, size_t most_leaks, TableSurvey& found) {
  std::vector<bool> claimed(found.next);
  for (const uint32_t entry : table) {
    if (entry == kEmpty) continue;
    if (claimed[entry] && !found.duplicate) found.duplicate = entry;
    claimed[entry] = true;
  }
  for (uint64_t chunk = 0; chunk < found.next;) {
    const auto here = claimed.begin() + static_cast<ptrdiff_t>(chunk);
    const auto end = std::find(here, claimed.end(), !*here) - claimed.begin();
    if (!*here && found.leaked.ranges() < most_leaks) found.leaked.add(chunk, static_cast<uint64_t>(end));
    chunk = static_cast<uint64_t>(end);
  }
}

void survey_sorted(const std::vector<uint32_t>& table, uint64_t used, size_t most_leaks, TableSurvey& found) {
  std::vector<uint32_t> claimed;
  claimed.reserve(used);
  for (const uint32_t entry : table)
    if (entry != kEmpty) claimed.push_back(entry);
  std::sort(claimed.begin(), claimed.end());
  uint64_t next = 0;
  for (const uint32_t chunk : claimed) {
    if (chunk < next && !found.duplicate) found.duplicate = chunk;
    if (found.leaked.ranges() < most_leaks) found.leaked.add(next, chunk);
    next = uint64_t{chunk} + 1;
  }
}

}  // namespace

Result<> check_reach(const Header& header, uint64_t next) {
  const std::optional<uint64_t> bytes = checked_multiply(next, header.chunk_size);
  if (bytes && *bytes < kMaxReach) return {};
  return fail(ErrorCode::corrupt, "the table claims chunk {}, and with {} bytes each there is no such place", next - 1,
              header.chunk_size);
}

TableSurvey survey(const std::vector<uint32_t>& table, size_t most_leaks) {
  TableSurvey found;
  uint64_t used = 0;
  for (const uint32_t entry : table) {
    if (entry == kEmpty) continue;
    ++used;
    found.next = std::max(found.next, uint64_t{entry} + 1);
  }
  if (used == 0) return found;
  if (found.next / 8 <= used * sizeof(uint32_t)) {
    survey_bits(table, most_leaks, found);
  } else {
    survey_sorted(table, used, most_leaks, found);
  }
  return found;
}

Chunks::Chunks(Storage& data, const Header& header, DeviceGrower grow_device)
    : data_(data),
      data_start_(header.data_start()),
      chunk_size_(header.chunk_size),
      grow_unit_(std::max({header.storage_grow_unit, header.chunk_size, kSmallestGrowUnit})),
      command_(header.add_storage_command),
      grow_device_(std::move(grow_device)) {}

Result<> Chunks::start(TableSurvey survey) {
  IMG_LET(uint64_t end, data_.size());
  unused_from_ = end <= data_start_ ? 0 : divide_up(end - data_start_, chunk_size_);
  const uint64_t used = data_start_ + survey.next * chunk_size_;
  if (end < used && data_.info().extensible) {
    // It ends inside its last chunk; other programs want it whole.
    IMG_TRY(data_.resize(used));
    end = used;
  }
  Lock lock(mutex_);
  free_ = std::move(survey.leaked);
  next_ = survey.next;
  file_end_ = end;
  return {};
}

std::optional<std::vector<Chunks::Chunk>> Chunks::take(uint64_t count, uint64_t& end) {
  Lock lock(mutex_);
  const uint64_t fresh = count - std::min(count, free_.numbers());
  end = data_start_ + (next_ + fresh) * chunk_size_;
  if (fresh > 0 && end > file_end_) return std::nullopt;
  std::vector<Chunk> chunks;
  chunks.reserve(count);
  while (chunks.size() < count - fresh) {
    const uint64_t leaked = free_.begin()->first;
    free_.remove(leaked, leaked + 1);
    chunks.push_back({static_cast<uint32_t>(leaked), false});
  }
  for (; chunks.size() < count; ++next_)
    chunks.push_back({static_cast<uint32_t>(next_), data_.info().extensible && next_ >= unused_from_});
  return chunks;
}

uint64_t Chunks::file_end() {
  Lock lock(mutex_);
  return file_end_;
}

Result<std::vector<Chunks::Chunk>> Chunks::reserve(uint64_t count) {
  for (;;) {
    uint64_t end = 0;
    if (auto chunks = take(count, end)) return std::move(*chunks);
    const auto lease = growth_.exclusive({GuestOffset(0), 1});
    if (file_end() >= end) continue;  // somebody else has done it
    if ((end - data_start_) / chunk_size_ > uint64_t{kMaxChunk} + 1)
      return fail(ErrorCode::no_space, "all chunks that a table can name are in use");
    IMG_LET(const uint64_t reached, make_room(end));
    Lock lock(mutex_);
    file_end_ = reached;
  }
}

void Chunks::give_back(std::span<const uint32_t> chunks) {
  for (const uint32_t chunk : chunks) (void)data_.discard({host(chunk), chunk_size_});
  Lock lock(mutex_);
  for (const uint32_t chunk : chunks) free_.add(chunk, uint64_t{chunk} + 1);
}

Result<uint64_t> Chunks::make_room(uint64_t end) {
  if (data_.info().extensible) {
    const std::optional<uint64_t> ahead = checked_add(file_end(), grow_unit_);
    const uint64_t wanted = std::max(end, ahead.value_or(end));
    // The unit is the image's word; the host may have a limit below it.
    if (data_.resize(wanted)) return wanted;
    IMG_TRY(data_.resize(end));
    return end;
  }
  if (!command_.empty()) {
    if (!grow_device_)
      return fail(ErrorCode::no_space,
                  "the device is full, and the image's command to make it longer is not run unless "
                  "--allow-storage-command is given");
    IMG_TRY(grow_device_(command_, grow_unit_, data_.info().name));
  }
  IMG_LET(const uint64_t reached, data_.size());
  if (end <= reached) return reached;
  return fail(ErrorCode::no_space, "the device has {} bytes, and another chunk needs {}", reached, end);
}

Result<> Chunks::clear(const Chunk& chunk) { return zero_and_free(data_, {host(chunk.number), chunk_size_}); }

}  // namespace imgfuse::fvd
