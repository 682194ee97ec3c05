#include "format/qcow2/entry_rules.h"

#include "base/math.h"

namespace imgfuse::qcow2 {
namespace {

constexpr uint64_t kAlloc = L2Format::kAllSubclusters;
constexpr uint64_t kZero = L2Format::kAllSubclusters << 32;

}  // namespace

bool EntryRules::names_host(L2Entry entry) const { return header_.l2_format().has_host(entry); }

bool EntryRules::in_file(HostRange range) const {
  const auto end = checked_add(range.begin.bytes(), range.length);
  return end && (*end <= file_size_ || *end - file_size_ < header_.cluster_size());
}

bool EntryRules::reads_host(L2Entry entry) const {
  return header_.l2_format().extended ? (entry.bitmap & kAlloc) != 0 : (entry.raw & kZeroFlag) == 0;
}

/// Reads as zeros where the host's bytes, which are out of reach, were read before. Version 2 knows no zero clusters:
/// there it can be done only where nothing lies below.
L2Entry EntryRules::without_host(L2Entry entry) const {
  const L2Format format = header_.l2_format();
  if (format.extended) {
    if (entry.raw & kCompressed) return format.zero_plain();
    return {0, (entry.bitmap & kZero) | (entry.bitmap & kAlloc) << 32};
  }
  if (header_.version >= 3) return format.zero_plain();
  return header_.backing_name ? entry : L2Entry{};
}

/// Bytes that are there win over a zero flag beside them; bytes that are nowhere are zeros.
L2Entry EntryRules::with_sound_subclusters(L2Entry entry) const {
  if (!header_.l2_format().extended) return entry;
  const uint64_t alloc = entry.bitmap & kAlloc;
  if (names_host(entry)) {
    entry.bitmap &= ~(alloc << 32);
  } else {
    entry.bitmap = (entry.bitmap & kZero) | alloc << 32;
  }
  return entry;
}

L2Entry EntryRules::mended_compressed(L2Entry entry, const Known& known) const {
  const L2Format format = header_.l2_format();
  // A data file holds no compressed bytes, and has one place only for each cluster.
  if (format.data_file) return known.guest ? format.normal(HostOffset(known.guest->bytes())) : entry;
  const CompressedRange range = entry.compressed_range(header_.cluster_bits);
  const uint64_t address = entry.raw & ((uint64_t{1} << (70 - header_.cluster_bits)) - 1);
  if (address >= kMaxHostOffset || !in_file({range.offset, range.length})) return without_host(entry);
  return {entry.raw & ~kCopied, 0};
}

L2Entry EntryRules::mended(L2Entry entry, const Known& known) const {
  if (entry.raw & kCompressed) return mended_compressed(entry, known);
  const L2Format format = header_.l2_format();
  entry.raw &= ~kL2Reserved;
  if (header_.version == 2) entry.raw &= ~kZeroFlag;
  entry = with_sound_subclusters(entry);
  if (!names_host(entry)) return entry;
  if (format.data_file) {
    if (!known.guest) return entry;
    return {(entry.raw & ~kOffsetMask) | known.guest->bytes() | kCopied, entry.bitmap};
  }

  const uint64_t skew = entry.host().bytes() % header_.cluster_size();
  if (skew != 0 && !(reads_host(entry) && known.sole)) return without_host(entry);
  entry.raw -= skew;
  return in_file({entry.host(), header_.cluster_size()}) ? entry : without_host(entry);
}

}  // namespace imgfuse::qcow2
