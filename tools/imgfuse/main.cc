#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <iostream>
#include <string>
#include <string_view>
#include <vector>

#include "command.h"

namespace imgfuse::tool {
namespace {

struct Command {
  std::string_view name;
  int (*run)(Io&, Arguments);
  std::string_view summary;
};

constexpr std::array kCommands = {
    Command{"mount", run_mount, "present an image as a raw file (the word mount may be left out)"},
    Command{"umount", run_umount, "unmount, and wait until the image is closed"},
    Command{"list", run_list, "list what is mounted"},
    Command{"status", run_status, "say what a mounted disk has done: requests, latencies, caches, jobs"},
    Command{"create", run_create, "make a new image"},
    Command{"snapshot", run_snapshot, "list, create, apply and delete snapshots, also of a mounted image"},
    Command{"bitmap", run_bitmap, "list, add, remove and clear dirty bitmaps, also of a mounted image"},
    Command{"info", run_info, "say what an image is"},
    Command{"map", run_map, "list which parts hold data, and where"},
    Command{"amend", run_amend, "change the options of an image"},
    Command{"check", run_check, "check an image, and repair it if asked to"},
    Command{"convert", run_convert, "copy an image to another one, of any format"},
    Command{"compare", run_compare, "say whether two images hold the same disk"},
    Command{"measure", run_measure, "say how much space a new image would take"},
    Command{"bench", run_bench, "measure how fast an image is, without FUSE"},
    Command{"resize", run_resize, "make a disk larger or smaller"},
    Command{"commit", run_commit, "move what an overlay holds into its backing file"},
    Command{"rebase", run_rebase, "give an image another backing file"},
    Command{"mirror", run_mirror, "copy a mounted disk to another image while it is in use"},
    Command{"backup", run_backup, "copy a mounted disk as it is now, while it is in use"},
    Command{"stream", run_stream, "make a mounted disk independent of its backing chain"},
    Command{"jobs", run_jobs, "list the jobs on a mounted disk"},
    Command{"job", run_job, "pause, resume, end or wait for a job"},
};

std::string usage() {
  std::string text =
      "Usage: imgfuse IMAGE MOUNTPOINT [OPTIONS]\n"
      "       imgfuse COMMAND ...\n"
      "\n"
      "Presents a virtual-disk image (qcow2, qed, fvd, raw) as a raw file. A MOUNTPOINT that is a file\n"
      "becomes the disk; in a directory the disk appears as disk.raw.\n"
      "\n"
      "Commands:\n";
  for (const Command& command : kCommands) text += fmt::format("  {:<8} {}\n", command.name, command.summary);
  text +=
      "\n"
      "Examples:\n"
      "  touch disk && imgfuse debian.qcow2 disk    # disk is now the raw disk\n"
      "  losetup --find --show --partscan disk      # its partitions as devices\n"
      "  imgfuse umount disk                        # returns when the image is safe\n"
      "\n"
      "\"imgfuse COMMAND --help\" lists the options of a command.\n";
  return text;
}

const Command* find_command(std::string_view name) {
  const auto* found = std::find_if(kCommands.begin(), kCommands.end(), [&](const auto& c) { return c.name == name; });
  return found == kCommands.end() ? nullptr : found;
}

int help(Io& io, Arguments args) {
  if (args.empty()) {
    io.out << usage() << std::flush;
    return kSuccess;
  }
  const Command* command = find_command(args.front());
  if (command != nullptr) return command->run(io, std::array<std::string, 1>{"--help"});
  io.err << fmt::format("imgfuse: no command \"{}\" (try \"imgfuse --help\")\n", args.front());
  return kUsage;
}

int run(Io& io, std::string_view program, Arguments args) {
  if (program.starts_with("mount.")) return run_mount_helper(io, args);
  if (args.empty()) {
    io.err << usage() << std::flush;
    return kUsage;
  }
  const std::string& first = args.front();
  if (first == "help" || first == "--help" || first == "-h") return help(io, args.subspan(1));
  if (first == "--version" || first == "-V") {
    io.out << "imgfuse " IMGFUSE_VERSION "\n" << std::flush;
    return kSuccess;
  }
  if (const Command* command = find_command(first)) return command->run(io, args.subspan(1));
  return run_mount(io, args);
}

}  // namespace
}  // namespace imgfuse::tool

int main(int argc, char** argv) {
  const std::vector<std::string> args(argv + std::min(argc, 1), argv + argc);
  const std::string program = argc > 0 ? std::filesystem::path(argv[0]).filename().string() : "imgfuse";
  imgfuse::tool::Io io{std::cout, std::cerr};
  return imgfuse::tool::run(io, program, args);
}
