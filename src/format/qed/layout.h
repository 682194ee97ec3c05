// The QED header as it lies on disk (FORMAT.md, "Layout"). Only header.cc looks at it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/endian.h"

namespace imgfuse::qed::wire {

inline constexpr uint32_t kMagic = 0x00444551;  // "QED\0"

struct Header {
  le<uint32_t> magic;
  le<uint32_t> cluster_size;
  le<uint32_t> table_size;   // of L1 and of each L2 table, in clusters
  le<uint32_t> header_size;  // in clusters
  le<uint64_t> features;
  le<uint64_t> compat_features;
  le<uint64_t> autoclear_features;
  le<uint64_t> l1_offset;
  le<uint64_t> image_size;
  le<uint32_t> backing_name_offset;
  le<uint32_t> backing_name_length;
};
static_assert(sizeof(Header) == 64 && alignof(Header) == 1);
static_assert(offsetof(Header, features) == 16);
static_assert(offsetof(Header, image_size) == 48);

}  // namespace imgfuse::qed::wire
