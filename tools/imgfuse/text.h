// What the subcommands have in common: reading and writing sizes, writing errors.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "command.h"
#include "imgfuse/error.h"

namespace imgfuse::tool {

/// "64", "64k", "1.5G": a number and one of k K M G T P E, powers of 1024; "B", "iB" may follow. The text of the
/// error names the argument.
Result<uint64_t> parse_size(std::string_view text);
/// "1.5 GiB", as qemu-img writes it: three significant digits.
std::string human_size(uint64_t bytes);

/// A text from an image, without what a terminal would act on.
std::string printable(std::string_view text);

/// One line, `imgfuse: SUBJECT: TEXT`, and a second one where a hint helps. A text that begins with the subject does
/// not get it twice. `subject` may be empty.
void print_error(Io& io, std::string_view subject, const Error& error, std::string_view hint = {});
void print_warning(Io& io, std::string_view subject, std::string_view text);

}  // namespace imgfuse::tool
