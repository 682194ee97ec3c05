// Compression and decompression. The only place that knows the compression libraries. Any thread; each keeps its own
// contexts, which it uses again.
#pragma once

#include <cstddef>
#include <cstdint>

#include "imgfuse/error.h"
#include "imgfuse/storage.h"

namespace imgfuse::codec {

/// Fills `out` completely from a raw deflate stream at the front of `in`. Bytes behind the stream are ignored, and so
/// is the rest of a stream that has more to give. Needs no memory that grows with the input.
Result<> inflate(ConstBytes in, Bytes out);

/// Fills `out` completely from the zstd frames at the front of `in`; a frame must end exactly where `out` does. Bytes
/// behind it are ignored.
Result<> unzstd(ConstBytes in, Bytes out);

/// Writes `in` (not empty) to the front of `out` as one raw deflate stream with distances of at most 4 KiB, the window
/// of QEMU's reader. Returns the stream's length, 0 if it does not fit.
size_t deflate(ConstBytes in, Bytes out);

/// Pieces of `in` that stand for the whole do not shrink, so that deflate(), which takes as long for what it cannot
/// compress as for what it can, would be in vain. Costs a small part of it.
bool looks_incompressible(ConstBytes in);

/// As deflate(), as one zstd frame. What cannot be compressed it finds out by itself, soon.
size_t zstd(ConstBytes in, Bytes out);

/// The checksum of gzip and PNG, of what had the checksum `before` and `in` behind it.
uint32_t crc32(ConstBytes in, uint32_t before = 0);

}  // namespace imgfuse::codec
