// The options of a new image, by qemu-img's names.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "imgfuse/create.h"
#include "imgfuse/error.h"

namespace imgfuse::tool {

/// What "-o help" prints.
extern const char* const kCreateOptionList;

/// "on" or "off".
Result<bool> parse_switch(std::string_view name, std::string_view text);
/// A whole number, which may be negative.
Result<int32_t> parse_seconds(std::string_view name, std::string_view text);
Result<Preallocation> parse_preallocation(std::string_view text);
/// One `key=value`.
Result<> set_create_option(CreateOptions& options, std::string_view key, const std::string& value);
/// `key=value,key=value`; a comma inside a value is doubled.
Result<> for_each_option(const std::string& list,
                         const std::function<Result<>(const std::string& key, const std::string& value)>& set);
Result<> set_create_options(CreateOptions& options, const std::string& list);

}  // namespace imgfuse::tool
