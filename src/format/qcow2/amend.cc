// Changes to the header of a closed image.
#include <algorithm>

#include "format/qcow2/downgrade.h"
#include "format/qcow2/header.h"
#include "format/qcow2/header_update.h"
#include "format/qcow2/qcow2.h"
#include "format/qcow2/snapshot_table.h"

namespace imgfuse::qcow2 {
namespace {

/// The header to change. Its unknown autoclear bits go, as at every change by somebody who does not know them.
Result<Header> header_to_change(Storage& storage) {
  IMG_LET(Header header, read_header(storage, Purpose::write));
  header.autoclear &= kBitmaps | kRawDataFile;
  return header;
}

Result<uint32_t> version_of(const std::string& compat) {
  if (compat == "0.10" || compat == "v2") return 2;
  if (compat == "1.1" || compat == "v3") return 3;
  return fail(ErrorCode::invalid, "compat is {:?}; it can be 0.10 or 1.1", compat);
}

/// What concerns the header alone.
Result<> change_fields(Header& header, const AmendOptions& options) {
  if (options.backing_format) {
    IMG_TRY(check_backing_format(*options.backing_format));
    if (!header.backing_name)
      return fail(ErrorCode::invalid, "the image has no backing file whose format could change");
    header.backing_format = options.backing_format;
  }
  if (options.data_file_raw) {
    if (*options.data_file_raw && (header.autoclear & kRawDataFile) == 0)
      return fail(ErrorCode::unsupported,
                  "data_file_raw can be switched on for a new image only: nobody knows whether the data file equals "
                  "the disk");
    if (!*options.data_file_raw) header.autoclear &= ~kRawDataFile;
  }
  if (options.lazy_refcounts) {
    if (*options.lazy_refcounts && header.version < 3)
      return fail(ErrorCode::invalid, "lazy_refcounts needs compat 1.1");
    header.compatible =
        *options.lazy_refcounts ? header.compatible | kLazyRefcounts : header.compatible & ~kLazyRefcounts;
  }
  return {};
}

/// Version 3 wants more of each snapshot; the repair of its table adds it.
Result<> complete_snapshots(Storage& storage) {
  IMG_LET(const Header header, read_header(storage, Purpose::write));
  IMG_LET(const SnapshotTable table, read_snapshot_table(storage, header));
  if (std::none_of(table.snapshots.begin(), table.snapshots.end(),
                   [](const Snapshot& snapshot) { return snapshot.lacks_extra_data(); }))
    return {};
  IMG_TRY(check(storage, Repair::all, [](const std::string&) {}));
  return storage.flush();
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

Result<> amend(std::shared_ptr<Storage> storage, const AmendOptions& options, BackingOpener open_backing) {
  IMG_LET(Header header, header_to_change(*storage));
  const uint32_t old_version = header.version;
  uint32_t version = old_version;
  if (options.compat) {
    IMG_LET(version, version_of(*options.compat));
  }
  if (version == 3) header.version = 3;
  IMG_TRY(change_fields(header, options));
  const bool downgrade = version < old_version;
  if (downgrade) {
    if (header.compatible & kLazyRefcounts && options.lazy_refcounts)
      return fail(ErrorCode::invalid, "lazy_refcounts needs compat 1.1");
    IMG_TRY(check_downgrade(*storage, header));
  }
  if (downgrade || (options.lazy_refcounts && !*options.lazy_refcounts && (header.incompatible & kDirty))) {
    IMG_TRY(downgrade ? remove_zero_clusters(storage, open_backing) : recount(*storage));
    IMG_LET(header, header_to_change(*storage));  // its tables may have moved
    if (!downgrade) IMG_TRY(change_fields(header, options));
  }
  if (downgrade) {
    if (options.backing_format) header.backing_format = options.backing_format;
    make_version_2(header);
  } else {
    header.version = version;
  }
  IMG_TRY(replace_header(*storage, header));
  return version > old_version ? complete_snapshots(*storage) : Result<>{};
}

}  // namespace imgfuse::qcow2
