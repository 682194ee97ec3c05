// Replacing the whole header of an image that holds data.
#pragma once

#include "format/qcow2/header.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"

namespace imgfuse::qcow2 {

/// Makes `next` the image's header, durably: the fields, the extensions and the backing file name. A crash at any
/// moment leaves the header of before or `next`, whole. `no_space` and nothing changed where the cluster has no room
/// for it. After another error either header may be the durable one.
///
/// Nobody else may write to the first cluster meanwhile. Blocks: one host flush, or up to six.
Result<> replace_header(Storage& storage, const Header& next);

}  // namespace imgfuse::qcow2
