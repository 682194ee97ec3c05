// What a subcommand takes from its command line, and where the values go.
#pragma once

#include <concepts>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "command.h"
#include "imgfuse/error.h"
#include "imgfuse/open.h"
#include "progress.h"

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace imgfuse::tool {

/// The options of one subcommand. Their names are given as "-f,--format"; what is known by its place instead has a name
/// in capitals, as "IMAGE". `kind` is what --help calls a value. Values have to live until parse() has put them there.
///
/// CLI11 reads the command line. Only command_line.cc includes it: it takes longer to compile than what a subcommand
/// does.
class CommandLine {
 public:
  class Option {
   public:
    const Option& required() const;
    const Option& needs(const Option& other) const;
    const Option& excludes(const Option& other) const;

   private:
    friend class CommandLine;
    explicit Option(CLI::Option* option) : option_(option) {}
    CLI::Option* option_;
  };
  /// Puts a value where it belongs, or says what is wrong with it.
  using Taker = std::function<Result<>(const std::string& value)>;

  /// `name`: as the subcommand is called, "imgfuse info".
  CommandLine(const std::string& description, const std::string& name);

  Option text(const std::string& names, std::string& value, const std::string& description = "",
              const char* kind = "TEXT");
  Option text(const std::string& names, std::optional<std::string>& value, const std::string& description = "",
              const char* kind = "TEXT");
  /// An option that may be given several times, or all that is left of what is known by its place.
  Option texts(const std::string& names, std::vector<std::string>& values, const std::string& description = "",
               const char* kind = "TEXT");
  /// A whole number from `least` to `most`, decimal or as 0xff.
  template <std::unsigned_integral N>
  Option number(const std::string& names, N& value, const std::string& description, const char* kind,
                uint64_t least = 0, uint64_t most = std::numeric_limits<N>::max()) {
    return take(
        names,
        [&value, least, most](const std::string& text) -> Result<> {
          IMG_LET(const uint64_t number, parse_number(text, least, most));
          value = static_cast<N>(number);
          return {};
        },
        description, kind);
  }
  /// As parse_size() reads it.
  Option size(const std::string& names, uint64_t& value, const std::string& description);
  /// What `meant(text)` makes of it.
  template <class T, class Meant>
  Option word(const std::string& names, T& value, Meant meant, const std::string& description,
              const char* kind = "WORD") {
    return take(
        names,
        [&value, meant](const std::string& text) -> Result<> {
          IMG_LET(value, meant(text));
          return {};
        },
        description, kind);
  }
  /// One whose value `taker` gets.
  Option take(const std::string& names, Taker taker, const std::string& description = "", const char* kind = "TEXT");

  void flag(const std::string& names, bool& value, const std::string& description = "");
  /// One that makes `value` be `meaning`.
  template <class T>
  void flag(const std::string& names, T& value, T meaning, const std::string& description) {
    when(
        names, [&value, meaning] { value = meaning; }, description);
  }

  /// Adds one of the words of which the command line has one; what is added to the result belongs to that word alone.
  CommandLine add_action(const std::string& word, const std::string& description);
  /// The word that was given.
  std::string chosen_action() const;

  /// -V and --version.
  void version(const std::string& text);
  /// What --help ends with.
  void footer(const std::string& text);

  /// Returns the exit status when there is nothing left to do: after --help, which goes to `out`, and after a usage
  /// error, which is one line on `err`.
  std::optional<int> parse(Io& io, Arguments args);
  /// For errors that are found later: writes where help is, and returns the exit status.
  int usage_error(Io& io, const Error& error) const;

 private:
  explicit CommandLine(std::shared_ptr<CLI::App> app) : app_(std::move(app)) {}
  static Result<uint64_t> parse_number(std::string_view text, uint64_t least, uint64_t most);
  void when(const std::string& names, std::function<void()> given, const std::string& description);

  std::shared_ptr<CLI::App> app_;
};

// What several subcommands take.

/// --format (with -f, except for mount), --backing-format (-F), --allow-path, --force-share (-U).
enum class FormatFlag { with_f, long_only };
void add_open_options(CommandLine& line, OpenOptions& options, FormatFlag flag = FormatFlag::with_f);
/// The first of them alone.
void add_format_option(CommandLine& line, std::optional<std::string>& format, FormatFlag flag = FormatFlag::with_f);
/// --json and qemu-img's --output=human|json.
void add_json_option(CommandLine& line, bool& json);
/// Directories for --allow-path.
void add_allow_path_option(CommandLine& line, std::vector<std::string>& directories);
/// -l, a snapshot by id or name, or as qemu-img's `snapshot.id=ID` and `snapshot.name=NAME`.
void add_snapshot_option(CommandLine& line, std::optional<std::string>& snapshot);
/// -p, and -q, which wins.
void add_progress_options(CommandLine& line, ShowProgress& show, const std::string& quiet = "Show no progress",
                          const std::string& progress = "Show progress, not only on a terminal");

/// One of qemu-img's names for how a file is cached.
Result<CacheMode> parse_cache_mode(std::string_view name);

}  // namespace imgfuse::tool
