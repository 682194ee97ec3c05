// The options of a new image, by qemu-img's names.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "command_line.h"
#include "imgfuse/create.h"
#include "imgfuse/error.h"

namespace imgfuse::tool {

/// "on" or "off".
Result<bool> parse_switch(std::string_view name, std::string_view text);
/// A whole number, which may be negative.
Result<int32_t> parse_seconds(std::string_view name, std::string_view text);
Result<Preallocation> parse_preallocation(std::string_view text);
/// One `key=value`.
Result<> set_create_option(CreateOptions& options, std::string_view key, const std::string& value);

using SetOption = std::function<Result<>(const std::string& key, const std::string& value)>;
/// What -o was given: `set` gets each pair of `key=value,key=value`, where a comma inside a value is doubled. For
/// "help", `known` is printed. Returns the exit status when there is nothing left to do, as CommandLine::parse().
std::optional<int> take_option_lists(Io& io, const CommandLine& line, const std::vector<std::string>& lists,
                                     const char* known, const SetOption& set);
/// The same with the options of a new image.
std::optional<int> take_create_options(Io& io, const CommandLine& line, const std::vector<std::string>& lists,
                                       CreateOptions& options);

}  // namespace imgfuse::tool
