// Looking at and changing the header of a closed image.
#include <algorithm>
#include <array>
#include <span>

#include "format/qed/header.h"
#include "format/qed/qed.h"

namespace imgfuse::qed {
namespace {

/// The header to change, as a writer may have it: autoclear bits that nobody knows go.
Result<Header> header_to_change(Storage& storage) {
  IMG_LET(Header header, read_header(storage));
  header.autoclear_features = 0;
  return header;
}

/// A write is atomic within 512 bytes: there the header and the name are replaced together.
constexpr uint64_t kSector = 512;

/// Where in the header area the new name can lie so that the old header and the old name stay right until the 64 bytes
/// of the new header are written. 0: nowhere.
uint64_t place_for_name(const Header& header, uint64_t length) {
  const uint64_t room = uint64_t{header.header_size} * header.cluster_size;
  const uint64_t old_begin = header.backing_name ? header.backing_name_offset : 0;
  const uint64_t old_end = header.backing_name ? old_begin + header.backing_name_length : 0;
  const auto fits = [&](uint64_t at) { return at + length <= room && (at >= old_end || at + length <= old_begin); };
  for (const uint64_t at : {kHeaderBytes, old_end})
    if (at >= kHeaderBytes && fits(at)) return at;
  return 0;
}

Result<> write_with_name(Storage& storage, Header header, const std::string& name) {
  const ConstBytes bytes = std::as_bytes(std::span(name));
  const uint64_t old_end = uint64_t{header.backing_name_offset} + header.backing_name_length;
  const bool one_sector = kHeaderBytes + name.size() <= kSector && (!header.backing_name || old_end <= kSector);
  const uint64_t room = uint64_t{header.header_size} * header.cluster_size;
  const uint64_t place = one_sector && kSector <= room ? kHeaderBytes : place_for_name(header, name.size());
  if (place == 0)
    return fail(ErrorCode::no_space,
                "the header of {} bytes has no room for a name of {} bytes beside the old one, which stays until the "
                "new one is durable",
                room, name.size());
  header.backing_name_offset = static_cast<uint32_t>(place);
  header.backing_name_length = static_cast<uint32_t>(name.size());
  if (one_sector) return write_header(storage, header, bytes);
  IMG_TRY(storage.write(HostOffset(place), bytes));
  IMG_TRY(storage.flush());
  return write_header(storage, header);
}

}  // namespace

Result<ImageInfo> info(Storage& storage) {
  IMG_LET(Header header, read_header(storage));
  ImageInfo image;
  image.format = "qed";
  image.virtual_size = header.image_size;
  image.cluster_size = header.cluster_size;
  image.dirty = (header.features & kNeedCheck) != 0;
  image.backing_format = header.backing_name ? header.backing_format() : std::nullopt;
  image.backing_filename = std::move(header.backing_name);
  return image;
}

Result<> change_backing(Storage& storage, const std::string& name, const std::optional<std::string>& format) {
  IMG_LET(Header header, header_to_change(storage));
  if (header.compat_features != 0)
    return fail(ErrorCode::unsupported,
                "the image has compatible features that imgfuse does not know (bits {:#x}); a new name might overwrite "
                "what belongs to them",
                header.compat_features);
  header.features &= ~(kBackingFile | kBackingIsRaw);
  if (name.empty()) {
    header.backing_name_offset = kHeaderBytes;
    header.backing_name_length = 0;
    IMG_TRY(write_header(storage, header));
    return storage.flush();
  }
  if (!format)
    return fail(ErrorCode::invalid, "the format of backing file {:?} is not given; it is never guessed", name);
  IMG_TRY(check_backing_format(*format));
  if (name.find('\0') != std::string::npos)
    return fail(ErrorCode::invalid, "the backing file name {:?} has a NUL byte", name);
  if (name.size() > kMaxBackingName)
    return fail(ErrorCode::invalid, "the backing file name of {} bytes is longer than {}", name.size(),
                kMaxBackingName);
  header.features |= kBackingFile | (*format == "raw" ? kBackingIsRaw : 0);
  IMG_TRY(write_with_name(storage, header, name));
  return storage.flush();
}

Result<> amend(std::shared_ptr<Storage> storage, const AmendOptions& options, BackingOpener) {
  IMG_LET(Header header, header_to_change(*storage));
  if (options.compat || options.lazy_refcounts || options.data_file_raw)
    return fail(ErrorCode::unsupported, "a QED image has nothing of this kind; its backing_fmt can be changed");
  if (options.backing_format) {
    IMG_TRY(check_backing_format(*options.backing_format));
    if (!header.backing_name)
      return fail(ErrorCode::invalid, "the image has no backing file whose format could change");
    header.features &= ~kBackingIsRaw;
    if (*options.backing_format == "raw") header.features |= kBackingIsRaw;
  }
  IMG_TRY(write_header(*storage, header));
  return storage->flush();
}

}  // namespace imgfuse::qed
