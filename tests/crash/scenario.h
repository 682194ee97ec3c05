// What a crash test begins with: an image of some kind, and what its disk reads as.
#pragma once

#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "support/builders.h"

namespace imgfuse::test {

/// What the disk starts from.
enum class Start {
  empty,
  backing,
  snapshot,  ///< every cluster is shared with one
  compressed,
  crowded,  ///< the next writes need a longer refcount table
};

/// Where guest data lies, if not in the image.
enum class DataFile { none, plain, raw };

struct Scenario {
  uint32_t cluster_size;
  uint32_t refcount_bits;
  uint32_t version;
  Start start;
  uint64_t weight = 1;                       ///< share of the states; images of large clusters are slow
  std::optional<std::string> compress = {};  ///< whole clusters that are written
  bool extended_l2 = false;
  bool lazy_refcounts = false;
  DataFile data_file = DataFile::none;
  uint32_t table_size = 0;          ///< of a QED image; 0: it is qcow2
  std::optional<FvdSpec> fvd = {};  ///< it is FVD: its own options
  bool copies = false;              ///< in between the backing file is copied
  const char* format() const { return table_size > 0 ? "qed" : "qcow2"; }
  /// Guest bytes that one L2 table maps, 8 bytes to a cluster.
  uint64_t coverage() const { return uint64_t{cluster_size} / 8 * cluster_size * std::max(table_size, 1u); }
  /// It does not open tables of one cluster, and computes the largest disk modulo 2^64.
  bool opens_in_qemu() const;
  std::string text() const;
};

/// A directory for the images that qemu-img sees.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "imgfuse-crash-XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()));
    path_ = name;
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

/// The exit status of a shell command, whose output is dropped.
int run(const std::string& command);
bool have_qemu_img();

/// An image's own file, and its external data file; without one that is empty and unused.
struct Files {
  MemImage image;
  MemImage data;
};

/// The image and the content that a scenario begins with.
struct Beginning {
  Files files;
  MemImage backing;
  MemImage content;  ///< what the guest reads
};

uint64_t disk_size(const Scenario& scenario);
Beginning begin(const Scenario& scenario, const std::vector<GuestRange>& windows, const TemporaryDirectory& directory,
                Rng& rng);

}  // namespace imgfuse::test
