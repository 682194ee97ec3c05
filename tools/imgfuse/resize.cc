// imgfuse resize: make a disk larger or smaller.
#include <limits>

#include "command_line.h"
#include "create_options.h"
#include "imgfuse/open.h"
#include "target.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

/// "10G" is a size, "+10G" and "-10G" are relative to the one there is.
struct NewSize {
  char sign = 0;
  uint64_t bytes = 0;

  Result<uint64_t> from(uint64_t old) const {
    if (sign == 0) return bytes;
    if (sign == '+' && bytes > uint64_t{std::numeric_limits<int64_t>::max()} - old)
      return fail(ErrorCode::invalid, "a disk of {} bytes cannot grow by {}", old, bytes);
    if (sign == '-' && bytes > old) return fail(ErrorCode::invalid, "a disk of {} bytes has no {} to lose", old, bytes);
    return sign == '+' ? old + bytes : old - bytes;
  }
};

Result<NewSize> parse_new_size(std::string_view text) {
  NewSize size;
  if (text.starts_with('+') || text.starts_with('-')) {
    size.sign = text.front();
    text.remove_prefix(1);
  }
  IMG_LET(size.bytes, parse_size(text));
  return size;
}

Result<> resize(const std::string& image, const OpenOptions& open, NewSize size, bool shrink,
                const std::string& preallocation) {
  IMG_LET(Target target, Target::open(image, open));
  IMG_LET(const control::Json info, target.run("info"));
  IMG_LET(const uint64_t bytes, size.from(info.at("virtual-size").get<uint64_t>()));
  IMG_TRY(target.run("resize", {{"size", bytes}, {"shrink", shrink}, {"preallocation", preallocation}}));
  return target.close();
}

/// "-10G" looks like options, which is why it is taken away before they are parsed.
bool is_negative(const std::string& text) {
  return text.size() > 1 && text[0] == '-' && text[1] >= '0' && text[1] <= '9';
}

}  // namespace

int run_resize(Io& io, Arguments args) {
  std::string image, size_text;
  OpenOptions open;
  bool shrink = false;
  std::string preallocation = "off";
  bool quiet = false;
  if (!args.empty() && is_negative(args.back())) {
    size_text = args.back();
    args = args.first(args.size() - 1);
  }
  CommandLine line("Makes a disk larger or smaller. What it gains reads as zeros.", "imgfuse resize");
  line.text("IMAGE", image, "An image, or the mount point of one").required();
  const auto size_option = line.text("SIZE", size_text, "The new size, as 10G; or by how much it changes: +10G, -10G");
  if (size_text.empty()) size_option.required();
  add_format_option(line, open.format);
  line.flag("--shrink", shrink, "Allow to lose what lies behind the new end");
  line.text("--preallocation", preallocation, "Of what is added: off (default), metadata, falloc or full");
  add_allow_path_option(line, open.allowed_directories);
  line.flag("-q,--quiet", quiet, "Say nothing on success");
  if (const auto status = line.parse(io, args)) return *status;

  if (const auto mode = parse_preallocation(preallocation); !mode) return line.usage_error(io, mode.error());
  const auto size = parse_new_size(size_text);
  if (!size) return line.usage_error(io, size.error());

  if (auto resized = resize(image, open, *size, shrink, preallocation); !resized) {
    print_error(io, image, resized.error());
    return kFailure;
  }
  if (!quiet) io.out << "Image resized.\n" << std::flush;
  return kSuccess;
}

}  // namespace imgfuse::tool
