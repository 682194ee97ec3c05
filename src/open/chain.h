// Image files and the chains they name, opened one layer at a time.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/cluster_cache.h"
#include "format/registry.h"
#include "imgfuse/open.h"
#include "open/path_policy.h"
#include "storage/file_storage.h"

namespace imgfuse {

/// One image: its file is open and locked, its format known, nothing of it looked at.
struct Layer {
  std::string path;  ///< as the user or the naming image means it
  std::shared_ptr<FileStorage> storage;
  const Format* format = nullptr;
  bool probed = false;
  std::optional<std::string> snapshot;  ///< of which it is to show; only the top image
};

/// Opens the image that the user named; its format is the option's or probed.
Result<Layer> open_top(const std::string& path, const OpenOptions& options, bool writable);

/// Opens what images name, downwards from a top image, under the path policy. Knows which files are in the chain
/// already, so that it neither runs in circles nor without end. One thread; it must outlive the opening of the disks,
/// not the disks.
class Chain {
 public:
  /// `path` is the top image, whether it is open, or not yet there.
  static Result<Chain> below(const std::string& path, const OpenOptions& options);

  void add_top(const Layer& layer) { files_.push_back(layer.storage->id()); }
  /// Whether one of the chain's images, or the data file of one, is that file.
  bool contains(FileId file) const;
  /// As OpenOptions::chain_end asks; before and after the disks are opened.
  Result<> find_end();
  Result<> check_end_reached() const;

  /// Opens the file that an image names, read-only. `probes`: see Format::probes_backing.
  Result<Layer> open_named(const std::string& naming_path, const std::string& name,
                           const std::optional<std::string>& format, bool probes = false);
  /// Makes a disk of a layer, with everything below it.
  Result<std::unique_ptr<Disk>> open_disk(const Layer& layer, bool read_only);
  /// Both in one. Null at the chain's end.
  Result<std::unique_ptr<Disk>> open_backing(const std::string& naming_path, const std::string& name,
                                             const std::optional<std::string>& format, bool probes = false);

 private:
  Chain(PathPolicy policy, const OpenOptions& options) : policy_(std::move(policy)), options_(options) {
    if (options.compressed_cache > 0) compressed_cache_ = std::make_shared<ClusterCache>(options.compressed_cache);
  }

  Result<std::shared_ptr<Storage>> open_data_file(const std::string& naming_path,
                                                  const std::optional<std::string>& name, bool read_only);
  FormatOpenParameters parameters_for(const std::string& path, const Format& opened, bool read_only);
  Result<std::shared_ptr<Storage>> open_data_format(std::shared_ptr<Storage> file,
                                                    const std::optional<std::string>& format, bool read_only);
  Result<const Format*> recorded_format(const std::optional<std::string>& format, bool probes) const;
  Result<bool> is_end(const std::string& naming_path, const std::string& name);
  uint64_t metadata_cache() const;
  Error locate(Error error, const char* what, const std::string& path);

  PathPolicy policy_;
  OpenOptions options_;
  std::shared_ptr<ClusterCache> compressed_cache_;  // the disks share it
  std::vector<FileId> files_;                       // images, top first
  std::vector<FileId> data_files_;
  std::optional<FileId> end_;  // where the chain stops
  bool end_reached_ = false;
  bool located_ = false;  // an error has been told apart by its file
};

}  // namespace imgfuse
