// What the subcommands have in common: reading arguments, writing errors and sizes.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "command.h"
#include "imgfuse/error.h"
#include "imgfuse/open.h"

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

/// --format (with -f, except for mount), --backing-format (-F), --allow-path, --force-share (-U).
enum class FormatFlag { with_f, long_only };
void add_open_options(CLI::App& app, OpenOptions& options, FormatFlag flag = FormatFlag::with_f);
/// --json and qemu-img's --output=human|json.
void add_json_option(CLI::App& app, bool& json);
/// -t or -T, qemu-img's names for how a file is cached.
void add_cache_option(CLI::App& app, const std::string& names, CacheMode& cache, const std::string& description);
/// Directories for --allow-path.
void add_allow_path_option(CLI::App& app, std::vector<std::string>& directories);
/// -l, a snapshot by id or name, or as qemu-img's `snapshot.id=ID` and `snapshot.name=NAME`.
void add_snapshot_option(CLI::App& app, std::optional<std::string>& snapshot);
/// An option whose value is a size, as parse_size() reads it.
CLI::Option* add_size_option(CLI::App& app, const std::string& names, uint64_t& size, const std::string& description);

/// Parses the arguments. Returns the exit status when there is nothing left to do: after --help, which goes to `out`,
/// and after a usage error, which is one line on `err`. The app's name is "imgfuse SUBCOMMAND".
std::optional<int> parse(CLI::App& app, Io& io, Arguments args);

}  // namespace imgfuse::tool
