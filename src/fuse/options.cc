#include "fuse/options.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <vector>

namespace imgfuse::fuse {
namespace {

/// Words for mount(8) and systemd, and mount flags without a meaning for one file without an owner's programs.
constexpr std::array<std::string_view, 31> kIgnored = {
    "defaults",
    "auto",
    "noauto",
    "nofail",
    "user",
    "nouser",
    "users",
    "group",
    "owner",
    "_netdev",
    "exec",
    "noexec",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "lazytime",
    "nolazytime",
    "async",
    "dirsync",
    "default_permissions",
    "nonempty",
    "comment",
};

struct Flag {
  std::string_view key;
  bool MountOptions::*member;
  bool value;
};
constexpr std::array kFlags = {
    Flag{"ro", &MountOptions::read_only, true},
    Flag{"rw", &MountOptions::read_only, false},
    Flag{"allow_other", &MountOptions::allow_other, true},
    Flag{"allow_root", &MountOptions::allow_root, true},
    Flag{"auto_unmount", &MountOptions::auto_unmount, true},
    Flag{"sync", &MountOptions::synchronous, true},
    Flag{"direct_io", &MountOptions::direct_io, true},
    Flag{"writeback_cache", &MountOptions::writeback_cache, true},
    Flag{"passthrough", &MountOptions::passthrough, true},
    Flag{"clone_fd", &MountOptions::clone_fd, true},
    Flag{"debug", &MountOptions::debug, true},
};

struct Option {
  std::string key;
  std::string value;
  bool has_value = false;
};

std::vector<Option> split(std::string_view list) {
  std::vector<Option> options;
  Option option;
  const auto end_option = [&] {
    if (!option.key.empty()) options.push_back(option);
    option = {};
  };
  for (size_t i = 0; i < list.size(); ++i) {
    const bool escaped = list[i] == '\\' && i + 1 < list.size();
    if (escaped) ++i;
    if (!escaped && list[i] == ',') {
      end_option();
    } else if (!escaped && list[i] == '=' && !option.has_value) {
      option.has_value = true;
    } else {
      (option.has_value ? option.value : option.key) += list[i];
    }
  }
  end_option();
  return options;
}

template <class T>
std::optional<T> parse_number(const std::string& text, int base) {
  T number = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number, base);
  if (text.empty() || error != std::errc() || rest != end) return std::nullopt;
  return number;
}

template <class T>
Result<T> decimal(const Option& option, T smallest, T largest) {
  const auto number = parse_number<T>(option.value, 10);
  if (!number || *number < smallest || *number > largest)
    return fail(ErrorCode::invalid, "option {}={}: a number from {} to {} is expected", option.key, option.value,
                smallest, largest);
  return *number;
}

Result<mode_t> permission_bits(const Option& option) {
  const auto bits = parse_number<mode_t>(option.value, 8);
  if (!bits || *bits > 0777)
    return fail(ErrorCode::invalid, "option {}={}: an octal number from 0 to 777 is expected", option.key,
                option.value);
  return *bits;
}

Result<Rings> rings(const Option& option) {
  if (option.value == "auto") return Rings::automatic;
  if (option.value == "on") return Rings::on;
  if (option.value == "off") return Rings::off;
  return fail(ErrorCode::invalid, "option io_uring={}: auto, on or off is expected", option.value);
}

/// The options that have a value. False if `option` is none of them.
Result<bool> take_value(const Option& option, MountOptions& options) {
  if (option.key == "uid") {
    IMG_LET(options.uid, decimal<uid_t>(option, 0, UINT32_MAX - 1));
  } else if (option.key == "gid") {
    IMG_LET(options.gid, decimal<gid_t>(option, 0, UINT32_MAX - 1));
  } else if (option.key == "umask") {
    IMG_LET(options.umask, permission_bits(option));
  } else if (option.key == "max_threads") {
    IMG_LET(options.max_threads, decimal<unsigned>(option, 1, 1024));
  } else if (option.key == "io_uring") {
    IMG_LET(options.rings, rings(option));
  } else if (option.key == "fsname") {
    options.fsname = option.value;
  } else if (option.key == "subtype") {
    options.subtype = option.value;
  } else {
    return false;
  }
  return true;
}

bool take_flag(const Option& option, MountOptions& options) {
  const auto* flag = std::find_if(kFlags.begin(), kFlags.end(), [&](const Flag& f) { return f.key == option.key; });
  if (flag == kFlags.end() || option.has_value) return false;
  options.*flag->member = flag->value;
  return true;
}

bool is_ignored(const Option& option) {
  return option.key.starts_with("x-") || option.key.starts_with("X-") ||
         std::find(kIgnored.begin(), kIgnored.end(), option.key) != kIgnored.end();
}

std::string escape(std::string_view value) {
  std::string escaped;
  for (const char c : value) {
    if (c == ',' || c == '\\') escaped += '\\';
    escaped += c;
  }
  return escaped;
}

}  // namespace

Result<> parse_options(std::string_view list, MountOptions& options, const OtherOption& other) {
  for (const Option& option : split(list)) {
    if (take_flag(option, options) || is_ignored(option)) continue;
    IMG_LET(const bool taken, take_value(option, options));
    if (taken) continue;
    IMG_LET(const bool taken_by_other, other(option.key, option.value));
    if (!taken_by_other) return fail(ErrorCode::invalid, "unknown option -o {}", option.key);
  }
  if (options.allow_other && options.allow_root)
    return fail(ErrorCode::invalid, "options allow_other and allow_root exclude each other");
  if (options.passthrough && (options.writeback_cache || options.direct_io))
    return fail(ErrorCode::invalid, "option passthrough excludes writeback_cache and direct_io");
  return {};
}

std::string libfuse_options(const MountOptions& options, std::string_view image) {
  // The kernel checks permissions by the modes that stat shows: libfuse would let everybody in with allow_other.
  std::string list = "default_permissions,nosuid,nodev";
  const auto add = [&](bool wanted, std::string_view word) {
    if (wanted) list.append(",").append(word);
  };
  add(options.read_only, "ro");
  add(options.allow_other, "allow_other");
  add(options.allow_root, "allow_root");
  add(options.auto_unmount, "auto_unmount");
  add(options.synchronous, "sync");
  add(options.debug, "debug");
  list += ",fsname=" + escape(options.fsname ? *options.fsname : std::string(image));
  list += ",subtype=" + escape(options.subtype);
  return list;
}

}  // namespace imgfuse::fuse
