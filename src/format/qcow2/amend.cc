// Changes to the header of a closed image.
#include "format/qcow2/header.h"
#include "format/qcow2/header_update.h"
#include "format/qcow2/qcow2.h"

namespace imgfuse::qcow2 {
namespace {

Result<> check_backing_format(const std::string& format) {
  if (format == "raw" || format == "qcow2") return {};
  return fail(ErrorCode::invalid, "backing format {:?} is neither raw nor qcow2", format);
}

/// The header to change. Its unknown autoclear bits go, as at every change by somebody who does not know them.
Result<Header> header_to_change(Storage& storage) {
  IMG_LET(Header header, read_header(storage, Purpose::write));
  header.autoclear &= kBitmaps | kRawDataFile;
  return header;
}

}  // namespace

Result<> change_backing(Storage& storage, const std::string& name, const std::optional<std::string>& format) {
  IMG_LET(Header header, header_to_change(storage));
  header.backing_name.reset();
  header.backing_format.reset();
  if (!name.empty()) {
    if (!format)
      return fail(ErrorCode::invalid, "the format of backing file {:?} is not given; it is never guessed", name);
    IMG_TRY(check_backing_format(*format));
    if (name.find('\0') != std::string::npos)
      return fail(ErrorCode::invalid, "the backing file name {:?} has a NUL byte", name);
    if (header.autoclear & kRawDataFile)
      return fail(ErrorCode::invalid, "the data file alone equals the disk, so there can be no backing file");
    header.backing_name = name;
    header.backing_format = format;
  }
  return replace_header(storage, header);
}

}  // namespace imgfuse::qcow2
