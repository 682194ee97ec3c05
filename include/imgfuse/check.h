// Checking and repairing images, and telling what they are without opening their chain.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "imgfuse/background_copy.h"
#include "imgfuse/bitmaps.h"
#include "imgfuse/error.h"
#include "imgfuse/open.h"

namespace imgfuse {

enum class Repair { none, leaks, all };

/// What a check found. Counts are of entries or clusters, as qemu-img counts them.
struct CheckReport {
  uint64_t corruptions = 0;   ///< left after repair
  uint64_t leaks = 0;         ///< left after repair
  uint64_t check_errors = 0;  ///< parts that could not be examined
  uint64_t corruptions_fixed = 0;
  uint64_t leaks_fixed = 0;
  uint64_t total_clusters = 0;
  uint64_t allocated_clusters = 0;
  uint64_t compressed_clusters = 0;
  uint64_t fragmented_clusters = 0;
  uint64_t image_end_offset = 0;
  bool clean() const { return corruptions == 0 && leaks == 0 && check_errors == 0; }
};

/// One finding, as it is met: "leaked cluster 7: refcount 1, references 0".
using CheckSink = std::function<void(const std::string& finding)>;

/// Checks the image's own structures (not its backing chain); repairs what `repair` says. A repair with an `undo_file`
/// makes that file, which must not exist, and keeps there what it overwrites; it is gone again if nothing was changed.
Result<CheckReport> check_image(const std::string& path, const OpenOptions& options, Repair repair,
                                const CheckSink& sink, const std::optional<std::string>& undo_file = {});

/// What taking back a repair did.
struct UndoReport {
  uint64_t pieces = 0;  ///< of the image, that got their old bytes back
  uint64_t bytes = 0;   ///< in them
  uint64_t size = 0;    ///< of the image, as before the repair
};

/// Takes back what a repair with this undo file did: the image is byte for byte what it was. Refuses, with nothing
/// changed, if the image is another one or has been changed since. Can be repeated after a crash.
Result<UndoReport> undo_repair(const std::string& path, const OpenOptions& options, const std::string& undo_file);

struct SnapshotInfo {
  std::string id;
  std::string name;
  uint64_t vm_state_size = 0;
  uint64_t disk_size = 0;
  uint32_t date_sec = 0;
  uint32_t date_nsec = 0;
  uint64_t vm_clock_nsec = 0;
  std::optional<uint64_t> icount;
};

/// The qcow2 part of ImageInfo.
struct Qcow2Info {
  std::string compat;            ///< "0.10" or "1.1"
  std::string compression_type;  ///< "zlib" or "zstd"
  uint32_t refcount_bits = 16;
  bool lazy_refcounts = false;
  bool corrupt = false;
  bool extended_l2 = false;
  std::vector<BitmapInfo> bitmaps;       ///< none where the image does not say that they are valid
  bool has_data_file = false;            ///< guest data lies in another file
  std::optional<std::string> data_file;  ///< its name as stored; an image may leave that to the user
  bool data_file_raw = false;
};

/// The FVD part of ImageInfo. Sizes are in bytes.
struct FvdInfo {
  bool all_data_in_image = true;  ///< no base, or everything was copied from it
  bool compact = false;
  uint64_t block_size = 0;         ///< with a base
  uint64_t base_size = 0;          ///< what of it counts
  uint64_t chunk_size = 0;         ///< (compact)
  uint64_t storage_grow_unit = 0;  ///< (compact)
  std::string add_storage_command;
  uint64_t journal_size = 0;
  bool need_zero_init = false;
  CopySettings copying;
  std::optional<std::string> data_file, data_file_format;
};

struct ImageInfo {
  std::string filename;
  std::string format;
  uint64_t virtual_size = 0;
  uint64_t actual_size = 0;  ///< host bytes in use
  std::optional<uint32_t> cluster_size;
  bool dirty = false;
  bool encrypted = false;
  std::optional<std::string> backing_filename;       ///< as stored
  std::optional<std::string> full_backing_filename;  ///< resolved against the image's directory
  std::optional<std::string> backing_format;
  std::vector<SnapshotInfo> snapshots;
  std::optional<Qcow2Info> qcow2;
  std::optional<std::string> full_data_file;  ///< resolved against the image's directory
  std::optional<FvdInfo> fvd;
};

/// Reads the image's own header; never opens what the image names.
Result<ImageInfo> image_info(const std::string& path, const OpenOptions& options);
/// The same for every image of the chain, top first. Opens backing files, under the path policy of `options`.
Result<std::vector<ImageInfo>> chain_info(const std::string& path, const OpenOptions& options);

}  // namespace imgfuse
