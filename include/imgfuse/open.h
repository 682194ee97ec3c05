// Opening an image and everything below it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "imgfuse/disk.h"
#include "imgfuse/error.h"

namespace imgfuse {

/// How the image file is accessed, in QEMU's words.
enum class CacheMode {
  writeback,     ///< through the host's page cache; durable after a flush
  none,          ///< O_DIRECT; durable after a flush
  writethrough,  ///< through the host's page cache; every write is durable when it returns
  directsync,    ///< O_DIRECT; every write is durable when it returns
  unsafe,        ///< flushes are ignored: for data that may be lost
};

struct OpenOptions {
  bool read_only = false;
  bool force_share = false;                   ///< take no locks; only with read_only
  std::optional<std::string> format;          ///< not probed if given
  std::optional<std::string> backing_format;  ///< for backing files without a recorded format; never probed otherwise
  CacheMode cache = CacheMode::writeback;
  std::optional<std::string> snapshot;  ///< id or name: present this internal snapshot; only with read_only
  /// Whole clusters that are written are compressed: "zlib" or "zstd", which must be the image's compression type.
  std::optional<std::string> compress;
  uint64_t compressed_cache = uint64_t{16} << 20;  ///< bytes of decompressed clusters kept in memory
  /// Bytes of tables kept in memory for the image. Each layer below it gets half as much as the one above.
  uint64_t metadata_cache = uint64_t{32} << 20;
  /// Directories below which files that images name may lie, besides the directory of the image opened here.
  std::vector<std::string> allowed_directories;
  /// The chain ends above this file, which is not opened: what only it or a file below it holds is not seen. Opening
  /// fails if the chain does not lead there.
  std::optional<std::string> chain_end;
  Disk* below_end = nullptr;  ///< that file as a disk, which is read in its place; open elsewhere, it outlives this one
  /// The external data file of the image opened here, whatever the image says and wherever it lies.
  std::optional<std::string> data_file;
  /// Format of data files whose images do not record it (FVD).
  std::optional<std::string> data_format;
  /// Images may have their own command run that makes a block device longer (FVD).
  bool allow_storage_command = false;
  /// Backing files are copied into the image opened here as these options say, and as the image itself does (FVD).
  /// Otherwise none of that happens.
  bool copy_in_background = false;
  bool copy_on_read = false;         ///< what is read from a backing file is kept in the image
  std::optional<uint64_t> prefetch;  ///< everything is copied, this many bytes a second; 0: as fast as it goes
};

/// Longest backing chain that is opened.
inline constexpr unsigned kMaxChainDepth = 200;

/// Opens the image and its backing chain (read-only, locked as readers). A dirty image is repaired first when it is
/// opened for writing. Backing files open only where OpenOptions allow them; names with a protocol prefix never do.
Result<std::unique_ptr<Disk>> open_disk(const std::string& path, const OpenOptions& options);

}  // namespace imgfuse
