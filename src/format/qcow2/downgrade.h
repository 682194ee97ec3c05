// From version 3 to version 2 (section 26), which has no zero clusters and no features.
#pragma once

#include <memory>

#include "format/qcow2/header.h"
#include "format/qcow2/qcow2.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"

namespace imgfuse::qcow2 {

/// Whether version 2 can say what the image says. Reads all tables; changes nothing.
Result<> check_downgrade(Storage& storage, const Header& header);

/// Afterwards no table has a zero cluster, and the image is clean. The disk reads as before at every moment. Called
/// after check_downgrade().
Result<> remove_zero_clusters(const std::shared_ptr<Storage>& storage, const BackingOpener& open_backing);

/// The header of the same image in version 2.
void make_version_2(Header& header);

}  // namespace imgfuse::qcow2
