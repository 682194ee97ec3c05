#include "command_line.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <array>
#include <charconv>
#include <ostream>
#include <utility>

#include "text.h"

namespace imgfuse::tool {

const CommandLine::Option& CommandLine::Option::required() const {
  option_->required();
  return *this;
}

const CommandLine::Option& CommandLine::Option::needs(const Option& other) const {
  option_->needs(other.option_);
  return *this;
}

const CommandLine::Option& CommandLine::Option::excludes(const Option& other) const {
  option_->excludes(other.option_);
  return *this;
}

CommandLine::CommandLine(const std::string& description, const std::string& name)
    : app_(std::make_shared<CLI::App>(description, name)) {}

CommandLine::Option CommandLine::take(const std::string& names, Taker taker, const std::string& description,
                                      const char* kind) {
  const auto set = [name = names.substr(names.find(',') + 1), taker = std::move(taker)](const std::string& value) {
    if (const Result<> taken = taker(value); !taken) throw CLI::ValidationError(name, taken.error().text());
  };
  return Option(app_->add_option_function<std::string>(names, set, description)->type_name(kind));
}

CommandLine::Option CommandLine::text(const std::string& names, std::string& value, const std::string& description,
                                      const char* kind) {
  return Option(app_->add_option(names, value, description)->type_name(kind));
}

CommandLine::Option CommandLine::text(const std::string& names, std::optional<std::string>& value,
                                      const std::string& description, const char* kind) {
  return Option(app_->add_option(names, value, description)->type_name(kind));
}

CommandLine::Option CommandLine::texts(const std::string& names, std::vector<std::string>& values,
                                       const std::string& description, const char* kind) {
  CLI::Option* const option = app_->add_option(names, values, description)->type_name(kind);
  if (names.starts_with('-')) option->allow_extra_args(false);
  return Option(option);
}

CommandLine::Option CommandLine::size(const std::string& names, uint64_t& value, const std::string& description) {
  return word(names, value, parse_size, description, "SIZE");
}

Result<uint64_t> CommandLine::parse_number(std::string_view text, uint64_t least, uint64_t most) {
  const bool hex = text.starts_with("0x") || text.starts_with("0X");
  const std::string_view digits = text.substr(hex ? 2 : 0);
  uint64_t number = 0;
  const char* const end = digits.data() + digits.size();
  const auto [rest, error] = std::from_chars(digits.data(), end, number, hex ? 16 : 10);
  if (error != std::errc() || rest != end || number < least || number > most) {
    if (most == std::numeric_limits<uint64_t>::max())
      return fail(ErrorCode::invalid, "\"{}\" is not a whole number from {} on, below 2^64", text, least);
    return fail(ErrorCode::invalid, "\"{}\" is not a number from {} to {}", text, least, most);
  }
  return number;
}

void CommandLine::flag(const std::string& names, bool& value, const std::string& description) {
  app_->add_flag(names, value, description);
}

void CommandLine::when(const std::string& names, std::function<void()> given, const std::string& description) {
  app_->add_flag_callback(names, std::move(given), description);
}

CommandLine CommandLine::add_action(const std::string& word, const std::string& description) {
  app_->require_subcommand(1);
  app_->fallthrough();  // options may stand behind the word, too
  return CommandLine(std::shared_ptr<CLI::App>(app_, app_->add_subcommand(word, description)));
}

std::string CommandLine::chosen_action() const { return app_->get_subcommands().front()->get_name(); }

void CommandLine::version(const std::string& text) { app_->set_version_flag("-V,--version", text); }

void CommandLine::footer(const std::string& text) { app_->footer(text); }

std::optional<int> CommandLine::parse(Io& io, Arguments args) {
  try {
    app_->parse(std::vector<std::string>(args.rbegin(), args.rend()));  // CLI11 wants them in reverse
    return std::nullopt;
  } catch (const CLI::CallForHelp&) {
    io.out << app_->help() << std::flush;
    return kSuccess;
  } catch (const CLI::CallForVersion& version) {
    io.out << version.what() << '\n' << std::flush;
    return kSuccess;
  } catch (const CLI::ParseError& error) {
    io.err << fmt::format("imgfuse: {} (try \"{} --help\")\n", error.what(), app_->get_name()) << std::flush;
    return kUsage;
  }
}

int CommandLine::usage_error(Io& io, const Error& error) const {
  print_error(io, "", error, fmt::format("\"{} --help\" lists the options", app_->get_name()));
  return kUsage;
}

void add_open_options(CommandLine& line, OpenOptions& options, FormatFlag flag) {
  add_format_option(line, options.format, flag);
  line.text(flag == FormatFlag::with_f ? "-F,--backing-format" : "--backing-format", options.backing_format,
            "Format of backing files whose overlay does not record it", "FORMAT");
  add_allow_path_option(line, options.allowed_directories);
  line.flag("-U,--force-share", options.force_share, "Take no locks: read an image that somebody else writes");
}

void add_format_option(CommandLine& line, std::optional<std::string>& format, FormatFlag flag) {
  line.text(flag == FormatFlag::with_f ? "-f,--format" : "--format", format,
            "The image's format; found out from the image if not given", "FORMAT");
}

void add_json_option(CommandLine& line, bool& json) {
  line.flag("--json", json, "Write JSON with qemu-img's keys");
  const auto is_json = [](const std::string& form) -> Result<bool> {
    if (form == "json" || form == "human") return form == "json";
    return fail(ErrorCode::invalid, "\"{}\" is neither human nor json", form);
  };
  line.word("--output", json, is_json, "human or json");
}

void add_allow_path_option(CommandLine& line, std::vector<std::string>& directories) {
  line.texts("--allow-path", directories,
             "Directory in which files named by the image may lie, besides the image's own; may be repeated", "DIR");
}

void add_snapshot_option(CommandLine& line, std::optional<std::string>& snapshot) {
  const auto set = [&snapshot](const std::string& name) -> Result<> {
    snapshot = name;
    for (const std::string_view key : {"snapshot.id=", "snapshot.name="})
      if (name.starts_with(key)) snapshot = name.substr(key.size(), name.find(',') - key.size());
    return {};
  };
  line.take("-l,--snapshot", set, "Read this internal snapshot, by id or name", "SNAPSHOT");
}

void add_progress_options(CommandLine& line, ShowProgress& show, const std::string& quiet,
                          const std::string& progress) {
  // In this order CLI11 sets them, whatever their order on the command line.
  line.flag("-p,--progress", show, ShowProgress::always, progress);
  line.flag("-q,--quiet", show, ShowProgress::never, quiet);
}

Result<CacheMode> parse_cache_mode(std::string_view name) {
  static constexpr std::array<std::pair<std::string_view, CacheMode>, 5> kModes = {{
      {"writeback", CacheMode::writeback},
      {"none", CacheMode::none},
      {"writethrough", CacheMode::writethrough},
      {"directsync", CacheMode::directsync},
      {"unsafe", CacheMode::unsafe},
  }};
  for (const auto& [word, mode] : kModes)
    if (word == name) return mode;
  return fail(ErrorCode::invalid, "cache mode \"{}\" is none of writeback, none, writethrough, directsync, unsafe",
              name);
}

}  // namespace imgfuse::tool
