// How guest writes, zeroes and copies from the base change an image.
#include <algorithm>
#include <array>
#include <limits>
#include <utility>
#include <vector>

#include "base/buffer.h"
#include "core/host_space.h"
#include "core/pieces.h"
#include "format/fvd/fvd_disk.h"

namespace imgfuse::fvd {
namespace {

/// Longest piece of a zeroing or populating request that holds its lease at once.
constexpr uint64_t kPiece = 256 << 20;
/// Longest copy from the base at once.
constexpr uint64_t kCopy = 2 << 20;

/// Scratch memory of the calling thread, at least `size` bytes.
Bytes scratch(size_t size) {
  thread_local Buffer buffer;
  buffer.reserve(size);
  return buffer.bytes().first(size);
}

/// The parts of `parts`, taken as one, that lie in [begin, begin + length).
std::vector<ConstBytes> slice(std::span<const ConstBytes> parts, uint64_t begin, uint64_t length) {
  std::vector<ConstBytes> slices;
  for (const ConstBytes part : parts) {
    if (begin >= part.size()) {
      begin -= part.size();
      continue;
    }
    const uint64_t here = std::min<uint64_t>(part.size() - begin, length);
    if (here == 0) break;
    slices.push_back(part.subspan(begin, here));
    length -= here;
    begin = 0;
  }
  return slices;
}

}  // namespace

/// What a request has to have alone. The lease covers whole blocks, since they are filled, and whole chunks where some
/// get storage; a block may reach into the next chunk.
GuestRange FvdDisk::exclusive_range(GuestRange range, Need need) const {
  if (need == Need::nothing) return range;
  if (header_.uses_base()) range = round_out(range, header_.block_size);
  return need == Need::chunks && header_.compact ? round_out(range, header_.chunk_size) : range;
}

Result<> FvdDisk::do_write(GuestOffset offset, ConstBytes data) {
  IMG_TRY(latch_.check());
  if (read_only_) return fail(ErrorCode::read_only, "{} is open read-only", name_);
  const GuestRange range{offset, data.size()};
  bool in_place = false, promoted = false;
  {
    const auto lease = ranges_.shared(range);
    in_place = map_.need(range) == Need::nothing;
    if (in_place) {
      if (!header_.compact) IMG_TRY(ensure_length(range.end().bytes()));
      promoted = map_.promote(range);  // also if writing fails: some of it may be there to see
      IMG_TRY(write_parts(range, {}, std::array{data}));
    }
  }
  if (in_place) return promoted ? relieve() : Result<>{};
  {
    // Needs only shrink, but for forget(), which has the whole disk alone.
    Need need = map_.need(range);
    for (;;) {
      const auto lease = ranges_.exclusive(exclusive_range(range, need));
      if (const Need found = map_.need(range); found > need) {
        need = found;
        continue;
      }
      IMG_TRY(store(offset, data, Durability::hard));
      break;
    }
  }
  return relieve();
}

/// Writes data that need new places, with what has to be filled around them. Under an exclusive lease.
Result<> FvdDisk::store(GuestOffset offset, ConstBytes data, Durability durability) {
  const GuestRange range{offset, data.size()};
  const GuestRange stored = map_.filled(range);
  const uint64_t head = range.begin - stored.begin;
  const uint64_t tail = stored.end() - range.end();
  const Bytes around = scratch(head + tail);
  if (head > 0) IMG_TRY(read_base(stored.begin, around.first(head)));
  if (tail > 0) IMG_TRY(read_base(range.end(), around.subspan(head)));
  if (!header_.compact) IMG_TRY(ensure_length(stored.end().bytes()));

  IMG_LET(const std::vector<NewChunk> chunks, reserve_chunks(stored, stored));
  const std::array<ConstBytes, 3> parts{around.first(head), data, around.subspan(head)};
  if (auto written = write_parts(stored, chunks, parts); !written) {
    for (const NewChunk& chunk : chunks) chunks_.give_back(std::span(&chunk.physical, 1));
    return written;
  }
  map_.publish(stored, chunks, durability);
  return {};
}

/// Chunks for what has no storage in the range. They read as zeros where they will not be overwritten at once.
Result<std::vector<NewChunk>> FvdDisk::reserve_chunks(GuestRange range, GuestRange overwritten) {
  const std::vector<uint64_t> missing = map_.missing_chunks(range);
  std::vector<NewChunk> chunks;
  if (missing.empty()) return chunks;
  IMG_LET(const std::vector<Chunks::Chunk> reserved, chunks_.reserve(missing.size()));
  Result<> cleared;
  for (size_t i = 0; i < missing.size(); ++i) {
    chunks.push_back({missing[i], reserved[i].number});
    const uint64_t begin = missing[i] * header_.chunk_size;
    const bool covered = overwritten.begin.bytes() <= begin && begin + header_.chunk_size <= overwritten.end().bytes();
    if (cleared && !reserved[i].fresh && !covered) cleared = chunks_.clear(reserved[i]);
  }
  if (!cleared) {
    for (const NewChunk& chunk : chunks) chunks_.give_back(std::span(&chunk.physical, 1));
    return fail(cleared.error());
  }
  return chunks;
}

/// One host write for each run of neighbouring chunks; nothing is copied.
Result<> FvdDisk::write_parts(GuestRange stored, std::span<const NewChunk> chunks, std::span<const ConstBytes> parts) {
  const auto host_run = [&](GuestOffset at) -> std::pair<HostOffset, uint64_t> {
    const uint64_t left = stored.end() - at;
    if (!header_.compact) return {HostOffset(header_.data_start() + at.bytes()), left};
    const uint64_t index = at.bytes() / header_.chunk_size;
    const uint64_t in_chunk = at.bytes() % header_.chunk_size;
    for (const NewChunk& chunk : chunks)
      if (chunk.index == index)
        return {chunks_.host(chunk.physical) + in_chunk, std::min(left, header_.chunk_size - in_chunk)};
    const uint32_t physical = map_.chunk(index);
    return {chunks_.host(physical) + in_chunk, std::min(left, header_.chunk_size - in_chunk)};
  };
  uint64_t done = 0;
  while (done < stored.length) {
    auto [host, length] = host_run(stored.begin + done);
    while (done + length < stored.length) {
      const auto [next, more] = host_run(stored.begin + done + length);
      if (next != host + length) break;
      length += more;
    }
    if (length == stored.length) return data_->write(host, parts);
    IMG_TRY(data_->write(host, slice(parts, done, length)));
    done += length;
  }
  return {};
}

/// The data region of an image that is not compact reaches to the disk's end, as other programs have it.
Result<> FvdDisk::ensure_length(uint64_t end) {
  if (whole_.load(std::memory_order_relaxed) || !data_->info().extensible) return {};
  const uint64_t wanted = header_.data_start() + std::max(end, do_size());
  IMG_LET(const uint64_t length, data_->size());
  if (length < wanted) IMG_TRY(data_->resize(wanted));
  whole_ = true;
  return {};
}

// ---- Zeroing

Result<> FvdDisk::do_write_zeroes(GuestRange range, Zeroing zeroing) {
  while (!range.empty()) {
    IMG_TRY(latch_.check());
    const GuestRange piece{range.begin, std::min(range.length, kPiece - range.begin.bytes() % kPiece)};
    {
      const auto lease = ranges_.exclusive(exclusive_range(piece, Need::chunks));
      IMG_TRY(zero_piece(piece, zeroing));
    }
    IMG_TRY(relieve());
    range = {piece.end(), range.length - piece.length};
  }
  return {};
}

Result<> FvdDisk::zero_piece(GuestRange range, Zeroing zeroing) {
  if (!header_.compact) IMG_TRY(ensure_length(range.end().bytes()));
  while (!range.empty()) {
    const Run run = map_.lookup(range);
    const GuestRange part{range.begin, run.length};
    map_.promote(part);
    if (run.kind == RunKind::image) IMG_TRY(zero_host({run.host, run.length}, zeroing));
    if (run.kind == RunKind::base) IMG_TRY(zero_base(part, zeroing, Durability::hard));
    range = {part.end(), range.length - part.length};
  }
  return {};
}

/// Whole blocks need their place zeroed and their bit set; a compact image has no place for what has no chunk. Parts of
/// blocks are written, with the rest of the block around them.
Result<> FvdDisk::zero_base(GuestRange range, Zeroing zeroing, Durability durability) {
  const uint64_t end = map_.base_end();
  // The block that the base's end cuts is whole there.
  const GuestRange counted{
      range.begin, range.end().bytes() == end ? round_up(end, header_.block_size) - range.begin.bytes() : range.length};
  const Pieces pieces = split(counted, header_.block_size);
  const auto write = [&](GuestRange part) -> Result<> {
    for (uint64_t done = 0; done < part.length;) {
      const ConstBytes zeros = zeroes(std::min<uint64_t>(part.length - done, kZeroesSize));
      IMG_TRY(store(part.begin + done, zeros, durability));
      done += zeros.size();
    }
    return {};
  };
  IMG_TRY(write({pieces.head.begin, std::min(pieces.head.length, range.end() - pieces.head.begin)}));
  if (!pieces.whole.empty()) {
    const GuestRange whole{pieces.whole.begin, std::min(pieces.whole.end(), range.end()) - pieces.whole.begin};
    for (GuestRange left = whole; !left.empty();) {
      const Run place = map_.place(left);
      if (place.kind == RunKind::image) IMG_TRY(zero_host({place.host, place.length}, zeroing));
      left = {left.begin + place.length, left.length - place.length};
    }
    map_.publish(whole, {}, durability);
  }
  return write(pieces.tail);
}

Result<> FvdDisk::zero_host(HostRange range, Zeroing zeroing) {
  return zeroing == Zeroing::may_free ? zero_and_free(*data_, range) : data_->write_zeroes(range);
}

// ---- Copying from the base

/// The copies are durable when it suits: a crash forgets them, and what the disk reads as stays what it is.
Result<> FvdDisk::do_populate(GuestRange range, Holes holes) {
  const uint64_t block = header_.uses_base() ? header_.block_size : kSector;
  range = round_out(range, block);  // copied whole
  range.length = std::min(range.end().bytes(), do_size()) - range.begin.bytes();
  while (!range.empty()) {
    IMG_TRY(latch_.check());
    const Run run = map_.lookup(range);
    GuestRange piece{range.begin, std::min(run.length, round_up(kPiece, block))};
    Holes in_piece = holes;
    if (run.kind == RunKind::base) {
      BelowRun below{piece.length, piece.begin.bytes() >= base_length_};
      if (!below.zero) {
        IMG_LET(below, run_below(*base_, base_length_, piece, block));
      }
      if (!below.zero) in_piece = Holes::fill;
      piece.length = in_piece == Holes::keep ? below.length : std::min(below.length, round_up(kCopy, block));
    }
    if (run.kind == RunKind::base || (run.kind == RunKind::zero && holes == Holes::fill)) {
      const auto lease = ranges_.exclusive(exclusive_range(piece, Need::chunks));
      IMG_TRY(populate_piece(piece, in_piece));
    }
    IMG_TRY(relieve());
    range = {piece.end(), range.length - piece.length};
  }
  return {};
}

/// Holes::keep: the base reads as zeros in all of it.
Result<> FvdDisk::populate_piece(GuestRange range, Holes holes) {
  while (!range.empty()) {
    const Run run = map_.lookup(range);
    GuestRange part{range.begin, run.length};
    if (run.kind == RunKind::base && holes == Holes::keep) {
      IMG_TRY(zero_base(part, Zeroing::may_free, Durability::soft));
    } else if (run.kind == RunKind::base) {
      part.length = std::min(part.length, kCopy);
      Buffer content(part.length);
      IMG_TRY(read_base(part.begin, content.bytes()));
      IMG_TRY(store(part.begin, content.bytes(), Durability::soft));
    } else if (run.kind == RunKind::zero && holes == Holes::fill) {
      IMG_LET(const std::vector<NewChunk> chunks, reserve_chunks(part, {}));
      for (const NewChunk& chunk : chunks) (void)data_->allocate({chunks_.host(chunk.physical), header_.chunk_size});
      map_.publish({part.begin, 0}, chunks, Durability::soft);
    }
    range = {part.end(), range.length - part.length};
  }
  return {};
}

// ---- Forgetting

/// Not monotone: first nothing of this may be left in the journal; then the bits go, then the chunks, so that no moment
/// shows a block that is in the image without its chunk.
Result<> FvdDisk::do_forget(GuestRange range) {
  {
    const auto lease = ranges_.exclusive({GuestOffset(0), std::numeric_limits<uint64_t>::max()});
    const bool kept = keeps_base_.exchange(true);
    Result<> returned = checkpoint();
    if (returned) returned = return_to_base();
    if (returned) map_.clear_blocks(range);
    keeps_base_ = kept;
    IMG_TRY(returned);
    IMG_TRY(checkpoint());
    if (header_.compact) {
      const bool to_end = range.end().bytes() == do_size();
      const uint64_t first = divide_up(range.begin.bytes(), header_.chunk_size);
      const uint64_t end = to_end ? header_.chunks() : range.end().bytes() / header_.chunk_size;
      const std::vector<uint32_t> freed = map_.unmap_chunks(first, std::max(first, end));
      IMG_TRY(checkpoint());
      chunks_.give_back(freed);
    }
  }
  return zero_rest(range);
}

/// An image that has said to have everything says that its bitmap counts again.
Result<> FvdDisk::return_to_base() {
  if (!map_.base_is_left()) return {};
  IMG_TRY(change_header([&] { return write_field<uint32_t>(*storage_, kAllDataField, 0); }));
  map_.set_base_left(false);
  return {};
}

/// What has no layer below it reads as zeros.
Result<> FvdDisk::zero_rest(GuestRange range) {
  const uint64_t begin = std::max(range.begin.bytes(), map_.base_end());
  if (begin >= range.end().bytes()) return {};
  return do_write_zeroes({GuestOffset(begin), range.end() - GuestOffset(begin)}, Zeroing::may_free);
}

}  // namespace imgfuse::fvd
