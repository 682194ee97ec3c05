// imgfuse bitmap: list, add, remove and clear the dirty bitmaps of an image, mounted or not.
#include <fmt/format.h>

#include "command_line.h"
#include "target.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

struct BitmapRequest {
  std::string image;
  std::string name;
  uint64_t granularity = uint64_t{64} << 10;
  OpenOptions open;
  bool json = false;
};

void print_list(Io& io, const control::Json& list, bool json) {
  if (json) {
    io.out << control::to_text(list) << "\n";
    return;
  }
  if (!list.empty()) io.out << fmt::format("{:<24}{:>12}  {}\n", "NAME", "GRANULARITY", "STATE");
  for (const control::Json& bitmap : list) {
    const char* state = bitmap.at("in-use").get<bool>() ? "in use" : bitmap.at("auto").get<bool>() ? "records" : "off";
    io.out << fmt::format("{:<24}{:>12}  {}\n", bitmap.at("name").get<std::string>(),
                          human_size(bitmap.at("granularity").get<uint64_t>()), state);
  }
}

Result<> run(Io& io, const BitmapRequest& request, const std::string& action) {
  const bool lists = action == "list";
  OpenOptions open = request.open;
  open.read_only = lists;
  IMG_LET(Target target, Target::open(request.image, open));
  control::Json arguments = control::Json::object();
  if (!lists) arguments["name"] = request.name;
  if (action == "add") arguments["granularity"] = request.granularity;
  IMG_LET(const control::Json answer, target.run("bitmap-" + action, arguments));
  IMG_TRY(target.close());
  if (lists) print_list(io, answer, request.json);
  io.out << std::flush;
  return {};
}

void add_action(CommandLine& line, BitmapRequest& request, const std::string& action, const std::string& description) {
  CommandLine command = line.add_action(action, description);
  command.text("IMAGE", request.image, "An image, or the mount point of one").required();
  if (action != "list") command.text("NAME", request.name, "The bitmap's name").required();
}

}  // namespace

int run_bitmap(Io& io, Arguments args) {
  BitmapRequest request;
  CommandLine line("Lists, adds, removes and clears the dirty bitmaps of an image, mounted or not.", "imgfuse bitmap");
  add_action(line, request, "list", "List the bitmaps");
  add_action(line, request, "add", "Begin to record what changes");
  add_action(line, request, "remove", "Forget a bitmap");
  add_action(line, request, "clear", "Start over: nothing has changed");
  line.size("-g,--granularity", request.granularity, "Bytes that one bit stands for, 512 to 2G (64k)");
  add_open_options(line, request.open);
  add_json_option(line, request.json);
  if (const auto status = line.parse(io, args)) return *status;
  if (const auto done = run(io, request, line.chosen_action()); !done) {
    print_error(io, request.image, done.error());
    return kFailure;
  }
  return kSuccess;
}

}  // namespace imgfuse::tool
