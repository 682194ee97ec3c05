// Making new images.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "imgfuse/disk.h"
#include "imgfuse/error.h"

namespace imgfuse {

/// What only FVD has. Sizes are in bytes.
struct FvdCreateOptions {
  bool compact = false;                         ///< chunks get storage when they are written
  std::optional<uint64_t> block_size;           ///< rounded up to 512; default: the smallest with a bitmap of 4 MiB
  uint64_t chunk_size = uint64_t{1} << 20;      ///< rounded up to 4096; a multiple of the block size
  uint64_t storage_grow_unit = 100ull << 20;    ///< at least one chunk
  std::string add_storage_command;              ///< stored; run only where that is allowed
  std::optional<uint64_t> journal_size;         ///< rounded up to 4096; default: 16 MiB
  bool journal = true;                          ///< false: metadata are written in place
  std::optional<std::string> data_file_format;  ///< default: raw
  bool copy_on_read = false;                    ///< what is read from the base is kept
  int32_t prefetch_start_delay = -1;            ///< seconds; 0 or less: no prefetching
  uint64_t detect_sparse_hole = 0;              ///< zeros of the base this long are not read from there; 0: no search
};

struct CreateOptions {
  std::string format = "qcow2";                  ///< "qcow2", "qed", "fvd" or "raw"
  std::optional<uint64_t> size;                  ///< bytes, rounded up to 512; default: the backing file's
  std::optional<std::string> backing_file;       ///< stored as given; relative names mean the new image's directory
  std::optional<std::string> backing_format;     ///< required with backing_file
  std::vector<std::string> allowed_directories;  ///< as in OpenOptions, for reading the backing file's size
  uint32_t version = 3;                          ///< qcow2: 2 ("0.10") or 3 ("1.1")
  uint32_t cluster_size = 65536;
  uint32_t refcount_bits = 16;
  bool lazy_refcounts = false;
  bool extended_l2 = false;               ///< 32 subclusters per cluster; clusters of 16 KiB or more
  std::optional<std::string> data_file;   ///< guest data lies there; stored as given, made if it is not there
  bool data_file_raw = false;             ///< the data file alone equals the disk
  std::string compression_type = "zlib";  ///< "zlib" or "zstd"
  Preallocation preallocation = Preallocation::off;
  bool durable = true;                 ///< false: what is lost in a power cut can be made again
  std::optional<uint32_t> table_size;  ///< QED: clusters per table, 1 to 16; default 4
  FvdCreateOptions fvd;
};

/// Creates the image file, durable with its directory entry when this returns unless that is not asked for. Every
/// option is checked before the file is touched; an existing file is replaced only if nobody has it locked.
Result<> create_image(const std::string& path, const CreateOptions& options);

}  // namespace imgfuse
