// Going through tables of 64-bit entries in bounded pieces.
#pragma once

#include <bit>
#include <cstdint>
#include <functional>
#include <span>

#include "base/endian.h"
#include "imgfuse/error.h"
#include "imgfuse/storage.h"
#include "imgfuse/units.h"

namespace imgfuse {

/// What becomes of the holes of a table, whose entries are zero.
enum class TableHoles { skipped, shown };

/// Shows the bytes of the table `range` (a multiple of 8 bytes) to `visit`, piece by piece, with the index of the
/// piece's first entry; writes a piece back when `visit` says that it changed it. An error from `visit` ends it.
Result<> edit_table_bytes(Storage& storage, HostRange range, TableHoles holes,
                          const std::function<Result<bool>(uint64_t first, Bytes piece)>& visit);

/// The same for entries of one byte order.
template <std::endian kOrder>
Result<> edit_table(Storage& storage, HostRange range, TableHoles holes,
                    const std::function<Result<bool>(uint64_t first, std::span<OnDisk<uint64_t, kOrder>>)>& visit) {
  return edit_table_bytes(storage, range, holes, [&](uint64_t first, Bytes piece) {
    return visit(first, {reinterpret_cast<OnDisk<uint64_t, kOrder>*>(piece.data()), piece.size() / 8});
  });
}

}  // namespace imgfuse
