// imgfuse snapshot: list, create, apply and delete the internal snapshots of an image, mounted or not.
#include "command_line.h"
#include "snapshot_list.h"
#include "target.h"
#include "text.h"

namespace imgfuse::tool {
namespace {

struct SnapshotRequest {
  std::string image;
  std::string name;
  OpenOptions open;
  bool json = false;
};

void print_list(Io& io, const control::Json& list, bool json) {
  if (json) {
    io.out << control::to_text(list) << "\n";
    return;
  }
  std::vector<SnapshotInfo> snapshots;
  for (const control::Json& snapshot : list) snapshots.push_back(control::snapshot_from_json(snapshot));
  if (!snapshots.empty()) print_snapshots(io.out, snapshots);
}

Result<> run(Io& io, const SnapshotRequest& request, const std::string& action) {
  const bool lists = action == "list";
  OpenOptions open = request.open;
  open.read_only = lists;
  IMG_LET(Target target, Target::open(request.image, open));
  control::Json arguments = control::Json::object();
  if (!lists) arguments[action == "create" ? "name" : "snapshot"] = request.name;
  IMG_LET(const control::Json answer, target.run("snapshot-" + action, arguments));
  IMG_TRY(target.close());
  if (lists) print_list(io, answer, request.json);
  if (action == "create" && request.json) print_list(io, answer, true);
  io.out << std::flush;
  return {};
}

void add_action(CommandLine& line, SnapshotRequest& request, const std::string& action,
                const std::string& description) {
  CommandLine command = line.add_action(action, description);
  command.text("IMAGE", request.image, "An image, or the mount point of one").required();
  if (action != "list")
    command.text("NAME", request.name, action == "create" ? "Its name" : "Its id or name").required();
}

}  // namespace

int run_snapshot(Io& io, Arguments args) {
  SnapshotRequest request;
  CommandLine line("Lists, creates, applies and deletes the snapshots inside an image, mounted or not.",
                   "imgfuse snapshot");
  add_action(line, request, "list", "List the snapshots");
  add_action(line, request, "create", "Keep what the disk holds now under a name");
  add_action(line, request, "apply", "Make the disk what it was; what was written since is lost");
  add_action(line, request, "delete", "Forget a snapshot, and give its space back");
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
