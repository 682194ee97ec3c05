#include <algorithm>
#include <vector>

#include "base/buffer.h"
#include "core/host_space.h"
#include "format/fvd/fvd.h"
#include "format/fvd/header.h"
#include "format/fvd/journal.h"

namespace imgfuse::fvd {
namespace {

constexpr uint64_t kLargestBitmap = 4 << 20;  // of an automatic block size
constexpr uint64_t kDefaultJournal = 16 << 20;
constexpr uint64_t kLongestHole = 64 << 20;

Result<> check_text(const std::string& text, size_t room, const char* name) {
  if (text.find('\0') != std::string::npos) return fail(ErrorCode::invalid, "the {} has a NUL byte", name);
  if (text.size() >= room)
    return fail(ErrorCode::invalid, "the {} has {} bytes; {} is the most", name, text.size(), room - 1);
  return {};
}

uint64_t automatic_block_size(uint64_t base_size) {
  uint64_t block = kSector;
  while (divide_up(divide_up(base_size, block), 8) > kLargestBitmap) block *= 2;
  return block;
}

/// The header of the new image. `base_length` counts with a base only.
Result<Header> plan(const CreateOptions& options, uint64_t base_length) {
  const FvdCreateOptions& own = options.fvd;
  Header header;
  header.virtual_size = options.size.value_or(0);
  uint64_t end = kHeaderRegion;
  if (options.backing_file) {
    header.all_data_in_image = false;
    header.base_name = *options.backing_file;
    header.base_format = options.backing_format.value_or("");
    header.base_size = std::min(header.virtual_size, round_up(base_length, kSector));
    const uint64_t block = round_up(own.block_size.value_or(automatic_block_size(header.base_size)), kSector);
    if (block == 0 || block >> 31) return fail(ErrorCode::invalid, "block size {} is out of range", block);
    header.block_size = static_cast<uint32_t>(block);
    header.bitmap_offset = end;
    header.bitmap_size = round_up(header.bitmap_bytes(), kPage);
    if (header.bitmap_size > kMaxTable)
      return fail(ErrorCode::invalid, "blocks of {} bytes need a bitmap of {}", block, header.bitmap_size);
    end += header.bitmap_size;
    header.copying.copy_on_read = own.copy_on_read;
    header.copying.start_delay = own.prefetch_start_delay > 0 ? own.prefetch_start_delay : -1;
    header.copying.bytes_per_prefetch = static_cast<uint32_t>(round_up(1 << 20, block));
  }
  header.data_name = options.data_file.value_or("");
  if (options.data_file) header.data_format = own.data_file_format.value_or("raw");  // not to be guessed later
  if (own.compact) {
    header.compact = true;
    header.chunk_size = round_up(own.chunk_size, kPage);
    if (header.uses_base() && header.chunk_size % header.block_size != 0)
      return fail(ErrorCode::invalid, "chunk size {} is not a multiple of the block size {}", header.chunk_size,
                  header.block_size);
    if (header.table_bytes() > kMaxTable)
      return fail(ErrorCode::invalid, "chunks of {} bytes need a table of {}; make them larger", header.chunk_size,
                  header.table_bytes());
    header.storage_grow_unit = std::max(own.storage_grow_unit, header.chunk_size);
    header.add_storage_command = own.add_storage_command;
    header.table_offset = end;
    end += round_up(header.table_bytes(), kPage);
  }
  if (own.journal && (header.compact || header.uses_base())) {
    const uint64_t least = divide_up(header.chunks(), kEntriesBesideBitmap) * kSector;
    header.journal_offset = end;
    header.journal_size = round_up(std::max(own.journal_size.value_or(kDefaultJournal), least), kPage);
    end += header.journal_size;
  }
  header.metadata_size = end;
  return header;
}

/// Windows of the base that are zeros are taken to be in the image, where nothing is stored yet.
Result<std::vector<std::byte>> search_holes(const Header& header, uint64_t window, Disk& base) {
  std::vector<std::byte> bitmap(header.bitmap_bytes());
  window = round_up(std::max<uint64_t>(window, header.block_size), header.block_size);
  Buffer buffer(window);
  const uint64_t end = std::min(header.base_end(), base.size());
  for (uint64_t at = 0; at < header.base_end(); at += window) {
    const uint64_t length = at < end ? std::min(window, end - at) : 0;
    IMG_TRY(base.read(GuestOffset(at), buffer.bytes().first(length)));
    if (!is_zero(buffer.bytes().first(length))) continue;
    const uint64_t last = divide_up(std::min(at + window, header.base_end()), header.block_size);
    for (uint64_t block = at / header.block_size; block < last; ++block)
      bitmap[block / 8] |= std::byte(1u << (block % 8));
  }
  return bitmap;
}

Result<> fill(Storage& storage, uint64_t begin, uint64_t length, std::byte value) {
  const std::vector<std::byte> piece(std::min<uint64_t>(length, 1 << 20), value);
  for (uint64_t done = 0; done < length;) {
    const uint64_t part = std::min<uint64_t>(length - done, piece.size());
    IMG_TRY(storage.write(HostOffset(begin + done), ConstBytes(piece).first(part)));
    done += part;
  }
  return {};
}

}  // namespace

Result<> check_create_options(const CreateOptions& options) {
  const FvdCreateOptions& own = options.fvd;
  IMG_TRY(check_text(options.backing_file.value_or(""), sizeof wire::Header::base_name, "backing file's name"));
  IMG_TRY(check_text(options.backing_format.value_or(""), sizeof wire::Header::base_format, "backing file's format"));
  IMG_TRY(check_text(options.data_file.value_or(""), sizeof wire::Header::data_name, "data file's name"));
  IMG_TRY(check_text(own.data_file_format.value_or(""), sizeof wire::Header::data_format, "data file's format"));
  IMG_TRY(check_text(own.add_storage_command, sizeof wire::Header::add_storage_command, "add_storage_cmd"));
  if (options.data_file_raw) return fail(ErrorCode::invalid, "data_file_raw is an option of qcow2");
  if (own.chunk_size == 0 || own.chunk_size >> 40)
    return fail(ErrorCode::invalid, "chunk size {} is out of range", own.chunk_size);
  if (own.storage_grow_unit >> 60) return fail(ErrorCode::invalid, "storage_grow_unit is out of range");
  if (own.block_size && (*own.block_size == 0 || *own.block_size >> 31))
    return fail(ErrorCode::invalid, "block size {} is out of range", *own.block_size);
  if (own.journal_size && *own.journal_size >> 40)
    return fail(ErrorCode::invalid, "journal size {} is out of range", *own.journal_size);
  if (!options.backing_file && (own.copy_on_read || own.prefetch_start_delay > 0 || own.detect_sparse_hole > 0))
    return fail(ErrorCode::invalid, "copy_on_read, prefetch_start_delay and detect_sparse_hole need a backing file");
  if (own.detect_sparse_hole > kLongestHole)
    return fail(ErrorCode::invalid, "detect_sparse_hole {} is more than {}", own.detect_sparse_hole, kLongestHole);
  if (options.preallocation == Preallocation::metadata || (own.compact && options.preallocation != Preallocation::off))
    return fail(ErrorCode::invalid, "FVD images can be preallocated with falloc and full, compact ones not at all");
  IMG_TRY(plan(options, options.size.value_or(0)));
  return {};
}

Result<> create(Storage& storage, const CreateOptions& options, Disk* backing) {
  IMG_LET(Header header, plan(options, backing != nullptr ? backing->size() : options.size.value_or(0)));
  std::vector<std::byte> bitmap;
  if (options.fvd.detect_sparse_hole > 0 && backing != nullptr) {
    IMG_LET(bitmap, search_holes(header, options.fvd.detect_sparse_hole, *backing));
    header.need_zero_init = !header.compact;
  }
  IMG_TRY(fill(storage, header.bitmap_offset, header.bitmap_size, std::byte{0}));
  if (!bitmap.empty()) IMG_TRY(storage.write(HostOffset(header.bitmap_offset), bitmap));
  IMG_TRY(fill(storage, header.table_offset, round_up(header.table_bytes(), kPage), std::byte{0xff}));
  IMG_TRY(fill(storage, header.journal_offset, header.journal_size, std::byte{0}));
  const bool holds_data = !header.compact && header.data_name.empty();
  IMG_TRY(storage.resize(header.metadata_size + (holds_data ? header.virtual_size : 0)));
  if (holds_data)
    IMG_TRY(preallocate(storage, {HostOffset(header.data_start()), header.virtual_size}, options.preallocation));
  const wire::Header wire = encode(header);
  return storage.write(HostOffset(0), std::as_bytes(std::span(&wire, 1)));
}

}  // namespace imgfuse::fvd
