#include "snapshot_list.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <ctime>
#include <ostream>

#include "text.h"

namespace imgfuse::tool {
namespace {

constexpr uint64_t kMillisecond = 1'000'000;
constexpr fmt::string_view kColumns = "{:<9} {:<16} {:>8}{:>20}{:>13}{:>11}{:>11}\n";

std::string date_of(const SnapshotInfo& snapshot) {
  return fmt::format("{:%Y-%m-%d %H:%M:%S}", fmt::localtime(std::time_t{snapshot.date_sec}));
}

/// How long the virtual machine had run: 00:00:00.000.
std::string clock_of(const SnapshotInfo& snapshot) {
  const uint64_t total = snapshot.vm_clock_nsec / kMillisecond;
  const uint64_t seconds = total / 1000;
  return fmt::format("{:02}:{:02}:{:02}.{:03}", seconds / 3600, seconds / 60 % 60, seconds % 60, total % 1000);
}

std::string icount_of(const SnapshotInfo& snapshot) {
  return snapshot.icount ? std::to_string(*snapshot.icount) : "--";
}

}  // namespace

void print_snapshots(std::ostream& out, const std::vector<SnapshotInfo>& snapshots) {
  out << "Snapshot list:\n"
      << fmt::format(fmt::runtime(kColumns), "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT", "DISK SIZE");
  for (const SnapshotInfo& snapshot : snapshots)
    out << fmt::format(fmt::runtime(kColumns), snapshot.id, printable(snapshot.name),
                       human_size(snapshot.vm_state_size), date_of(snapshot), clock_of(snapshot), icount_of(snapshot),
                       human_size(snapshot.disk_size));
}

}  // namespace imgfuse::tool
