// The subcommands of imgfuse: each is a function over an injected Io, so that tests can call it without a process.
#pragma once

#include <iosfwd>
#include <span>
#include <string>

namespace imgfuse::tool {

/// Where a subcommand talks to. Results go to `out`; errors, warnings and progress go to `err`.
struct Io {
  std::ostream& out;
  std::ostream& err;
};

/// Exit statuses. `check` has more, see run_check().
inline constexpr int kSuccess = 0;
inline constexpr int kFailure = 1;
inline constexpr int kUsage = 2;

/// The arguments of a subcommand, without the program's and the subcommand's name.
using Arguments = std::span<const std::string>;

int run_mount(Io& io, Arguments args);
/// As mount(8) calls `/sbin/mount.imgfuse`: `SPEC DIR [-sfnv] [-o OPTIONS] [-t TYPE]`.
int run_mount_helper(Io& io, Arguments args);
int run_umount(Io& io, Arguments args);
int run_create(Io& io, Arguments args);
int run_snapshot(Io& io, Arguments args);
int run_bitmap(Io& io, Arguments args);
int run_amend(Io& io, Arguments args);
int run_info(Io& io, Arguments args);
int run_map(Io& io, Arguments args);
int run_check(Io& io, Arguments args);
int run_convert(Io& io, Arguments args);
int run_compare(Io& io, Arguments args);
int run_measure(Io& io, Arguments args);
int run_bench(Io& io, Arguments args);
int run_resize(Io& io, Arguments args);
int run_commit(Io& io, Arguments args);
int run_rebase(Io& io, Arguments args);
int run_mirror(Io& io, Arguments args);
int run_stream(Io& io, Arguments args);
int run_backup(Io& io, Arguments args);
int run_jobs(Io& io, Arguments args);
int run_list(Io& io, Arguments args);
int run_status(Io& io, Arguments args);
int run_job(Io& io, Arguments args);

}  // namespace imgfuse::tool
