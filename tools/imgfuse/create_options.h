// The options of a new image, by qemu-img's names.
#pragma once

#include <string>
#include <string_view>

#include "imgfuse/create.h"
#include "imgfuse/error.h"

namespace imgfuse::tool {

/// What "-o help" prints.
extern const char* const kCreateOptionList;

Result<Preallocation> parse_preallocation(std::string_view text);
/// One `key=value`.
Result<> set_create_option(CreateOptions& options, std::string_view key, const std::string& value);
/// `key=value,key=value`; a comma inside a value is doubled.
Result<> set_create_options(CreateOptions& options, const std::string& list);

}  // namespace imgfuse::tool
