// Changing what an image's header says, without touching guest data.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "imgfuse/error.h"

namespace imgfuse {

/// FVD: how blocks are copied from the base, and what the header says of the image.
struct FvdSettings {
  std::optional<bool> copy_on_read, need_zero_init, clean_shutdown;
  std::optional<uint64_t> max_outstanding_copy_on_read_data;  ///< bytes
  std::optional<int32_t> prefetch_start_delay;                ///< seconds; 0 or less: off
  std::optional<uint32_t> num_prefetch_slots, bytes_per_prefetch;
  std::optional<uint32_t> prefetch_read_throughput_measure_time, prefetch_write_throughput_measure_time;  ///< ms
  std::optional<uint32_t> prefetch_perf_calc_alpha;                                                       ///< percent
  std::optional<uint32_t> prefetch_min_read_throughput, prefetch_min_write_throughput;                    ///< KiB/s
  std::optional<int32_t> prefetch_throttle_time;                                                          ///< ms
  std::optional<std::string> data_file, data_file_format;
};

/// What is given is changed; the rest stays.
struct AmendOptions {
  std::optional<std::string> format;  ///< of the image; not probed if given
  std::optional<std::string> compat;  ///< "0.10" or "1.1"
  std::optional<bool> lazy_refcounts;
  std::optional<std::string> backing_format;  ///< "raw", "qcow2", "qed" or "fvd"
  std::optional<bool> data_file_raw;          ///< only off: that a data file equals the disk cannot be promised later
  FvdSettings fvd;
  std::vector<std::string> allowed_directories;  ///< as in OpenOptions, for a backing file that has to be read
};

/// Changes the image, which nobody may have open. Everything is checked before anything changes; a crash leaves the
/// old or the new header.
Result<> amend_image(const std::string& path, const AmendOptions& options);

/// Records another backing file, by name and format ("raw", "qcow2", "qed" or "fvd"); an empty name records none.
/// Nothing is copied or compared: what the disk reads as changes unless the two backing files are alike. The name is
/// stored as given and the file not looked at.
Result<> change_backing(const std::string& path, const std::string& name, const std::optional<std::string>& format);

}  // namespace imgfuse
