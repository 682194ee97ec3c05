// A write is atomic within one sector only, so a header that is longer changes in two switches of the first sector
// (FORMAT.md, "Replacing the header").
#include "format/qcow2/header_update.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <optional>

#include "base/buffer.h"
#include "base/endian.h"
#include "base/math.h"
#include "format/qcow2/layout.h"

namespace imgfuse::qcow2 {
namespace {

constexpr size_t kSector = 512;
constexpr size_t kExtensionHeader = sizeof(wire::ExtensionHeader);

/// A part of the first cluster.
struct Part {
  size_t begin = 0;
  size_t end = 0;
  size_t length() const { return end - begin; }
};

/// Where the parts of a header area lie.
struct Area {
  std::vector<size_t> extensions;  ///< where each begins, the end marker last
  size_t extensions_end = 0;
  Part name;                    ///< of the backing file; empty without one
  std::optional<Part> padding;  ///< our padding extension, up to the extension behind it
};

template <class T>
T load(ConstBytes bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

/// `bytes` hold a header that read_header() accepts.
Area parse(ConstBytes bytes) {
  const auto header = load<wire::Header>(bytes, 0);
  Area area;
  if (const uint64_t name = header.backing_name_offset; name != 0)
    area.name = {name, name + uint32_t{header.backing_name_length}};
  const size_t limit = area.name.begin != 0 ? area.name.begin : bytes.size();
  size_t at = header.version == 2 ? wire::kHeaderLengthV2 : uint32_t{header.header_length};
  while (at + kExtensionHeader <= limit) {
    const auto extension = load<wire::ExtensionHeader>(bytes, at);
    const size_t next = std::min<size_t>(at + kExtensionHeader + round_up(extension.length, 8), limit);
    area.extensions.push_back(at);
    if (extension.type == wire::kExtensionPadding) area.padding = Part{at, next};
    at = extension.type == wire::kExtensionEnd ? at + kExtensionHeader : next;
    if (extension.type == wire::kExtensionEnd) break;
  }
  area.extensions_end = at;
  return area;
}

/// A header area without its padding extension: what lies behind it is moved up, the backing name with it.
std::vector<std::byte> without_padding(ConstBytes bytes, const Area& area) {
  const size_t end = std::max(area.extensions_end, area.name.end);
  std::vector<std::byte> home(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(area.padding->begin));
  home.insert(home.end(), bytes.begin() + static_cast<ptrdiff_t>(area.padding->end),
              bytes.begin() + static_cast<ptrdiff_t>(end));
  if (area.name.begin != 0) {
    auto header = load<wire::Header>(bytes, 0);
    header.backing_name_offset = area.name.begin - area.padding->length();
    std::memcpy(home.data(), &header, offsetof(wire::Header, backing_name_length));
  }
  return home;
}

class HeaderUpdate {
 public:
  HeaderUpdate(Storage& storage, size_t cluster_size) : storage_(storage), current_(cluster_size) {}

  Result<> replace(const std::vector<std::byte>& home);

 private:
  Result<> load_current();
  std::optional<size_t> only_sector_that_differs(ConstBytes home) const;
  Result<> finish_earlier();
  Result<size_t> find_room(const Area& old, size_t home_length, size_t length) const;
  Result<> move_away(ConstBytes home);
  Result<> move_home(ConstBytes home);
  Result<> write(size_t at, ConstBytes bytes);
  Result<> switch_to(Buffer first_sector);

  Storage& storage_;
  Buffer current_;  // the first cluster
};

Result<> HeaderUpdate::load_current() { return storage_.read(HostOffset(0), current_.bytes()); }

Result<> HeaderUpdate::write(size_t at, ConstBytes bytes) {
  if (!bytes.empty()) IMG_TRY(storage_.write(HostOffset(at), bytes));
  return storage_.flush();
}

/// The one write that makes another header area the one that is read.
Result<> HeaderUpdate::switch_to(Buffer first_sector) { return write(0, first_sector.bytes()); }

/// Nothing if several sectors differ. What lies behind the new area does not count.
std::optional<size_t> HeaderUpdate::only_sector_that_differs(ConstBytes home) const {
  std::optional<size_t> found;
  for (size_t at = 0; at < home.size(); at += kSector) {
    const size_t n = std::min(kSector, home.size() - at);
    if (std::memcmp(home.data() + at, current_.data() + at, n) == 0) continue;
    if (found) return std::nullopt;
    found = at;
  }
  return found.value_or(0);
}

Result<> HeaderUpdate::replace(const std::vector<std::byte>& home) {
  IMG_TRY(load_current());
  IMG_TRY(finish_earlier());
  if (const auto at = only_sector_that_differs(home))
    return write(*at, ConstBytes(home).subspan(*at, std::min(kSector, home.size() - *at)));
  IMG_TRY(move_away(home));
  return move_home(home);
}

/// A crash between the two switches has left the padding: the header that it belongs to goes home first, since there
/// may be no room for a third one.
Result<> HeaderUpdate::finish_earlier() {
  const Area area = parse(current_.bytes());
  if (!area.padding || area.padding->end < kSector) return {};
  const std::vector<std::byte> home = without_padding(current_.bytes(), area);
  if (home.size() > area.padding->end) return {};  // not made here
  IMG_TRY(move_home(home));
  return load_current();
}

/// Room for `length` bytes in the first cluster: not in the first sector, not in the old area, not where the new one
/// will be.
Result<size_t> HeaderUpdate::find_room(const Area& old, size_t home_length, size_t length) const {
  for (const size_t behind : {old.extensions_end, std::max(old.extensions_end, old.name.end)}) {
    const size_t at = round_up(std::max({kSector, behind, home_length}), 8);
    const bool meets_name = at < old.name.end && old.name.begin < at + length;
    if (!meets_name && at + length <= current_.size()) return at;
  }
  return fail(ErrorCode::no_space,
              "the first cluster ({} bytes) has no room to change a header of {} bytes in a way that a crash cannot "
              "harm",
              current_.size(), home_length);
}

/// First switch. The first sector keeps the fields and those extensions that fit into it; a padding extension behind
/// them reaches over the old area to the rest.
Result<> HeaderUpdate::move_away(ConstBytes home) {
  const Area next = parse(home);
  size_t cut = 0;  // where the rest begins at home
  for (const size_t extension : next.extensions)
    if (extension + kExtensionHeader <= kSector) cut = extension;
  if (cut == 0)
    return fail(ErrorCode::unsupported, "the header's fields take the whole first sector, so it cannot be changed");
  const ConstBytes rest = home.subspan(cut);
  IMG_LET(const size_t at, find_room(parse(current_.bytes()), home.size(), rest.size()));
  IMG_TRY(write(at, rest));

  Buffer sector = Buffer::zeroed(kSector);
  std::memcpy(sector.data(), home.data(), cut);
  wire::ExtensionHeader padding;
  padding.type = wire::kExtensionPadding;
  padding.length = static_cast<uint32_t>(at - cut - kExtensionHeader);
  std::memcpy(sector.data() + cut, &padding, sizeof padding);
  if (next.name.begin != 0) {
    const be<uint64_t> name = next.name.begin - cut + at;
    std::memcpy(sector.data() + offsetof(wire::Header, backing_name_offset), &name, sizeof name);
  }
  return switch_to(std::move(sector));
}

/// Second switch. The padding hides the place where the area goes.
Result<> HeaderUpdate::move_home(ConstBytes home) {
  const ConstBytes first = home.first(std::min(kSector, home.size()));
  IMG_TRY(write(kSector, home.subspan(first.size())));
  Buffer sector = Buffer::zeroed(kSector);
  std::memcpy(sector.data(), first.data(), first.size());
  return switch_to(std::move(sector));
}

/// Bitmaps that were not kept up are lost already (section 20): their extension goes with the next header.
Header without_lost_bitmaps(Header header) {
  if ((header.autoclear & kBitmaps) == 0)
    std::erase_if(header.extensions, [](const Extension& e) { return e.type == wire::kExtensionBitmaps; });
  return header;
}

}  // namespace

Result<> replace_header(Storage& storage, const Header& next) {
  IMG_LET(const std::vector<std::byte> home, encode_header(without_lost_bitmaps(next)));
  return HeaderUpdate(storage, next.cluster_size()).replace(home);
}

}  // namespace imgfuse::qcow2
