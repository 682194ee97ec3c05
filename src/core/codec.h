// Decompression. The only place that knows the compression libraries.
#pragma once

#include "imgfuse/error.h"
#include "imgfuse/storage.h"

namespace imgfuse::codec {

/// Fills `out` completely from a raw deflate stream at the front of `in`. Bytes behind the stream are ignored, and so
/// is the rest of a stream that has more to give. Needs no memory that grows with the input.
Result<> inflate(ConstBytes in, Bytes out);

/// Fills `out` completely from the zstd frames at the front of `in`; a frame must end exactly where `out` does. Bytes
/// behind it are ignored.
Result<> unzstd(ConstBytes in, Bytes out);

}  // namespace imgfuse::codec
