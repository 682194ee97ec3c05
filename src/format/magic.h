// By what their first bytes image formats are known.
#pragma once

#include <optional>
#include <string_view>

#include "imgfuse/storage.h"

namespace imgfuse {

/// As many bytes as magic_format() wants to see; fewer will do for a shorter file.
inline constexpr size_t kMagicBytes = 512;

/// The format that the first bytes of a file claim, supported or not; nothing if they look like a raw disk.
std::optional<std::string_view> magic_format(ConstBytes first_bytes);

}  // namespace imgfuse
