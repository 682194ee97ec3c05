// Failing the n-th storage call of an operation, for every n.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/model_disk.h"

namespace imgfuse::test {

/// A disk that is opened over storage that fails; it has `content`. Its clusters have 4 KiB, or 512 bytes.
struct Situation {
  static constexpr uint64_t kCluster = 4096;
  static constexpr uint64_t kSize = 8_MiB;

  MemImage image;
  MemImage content;
  MemImage backing;
  uint64_t size = kSize;
  std::optional<std::string> compress;
  std::optional<MemImage> data;  ///< the external data file
  bool raw = false;              ///< which reads as the disk does
};

/// What is asked of the disk. The model is told first.
struct Operation {
  std::string name;
  std::function<Result<>(Disk&, ModelDisk&)> run;
};

/// These tell the model first.
Result<> write(Disk& disk, ModelDisk& model, uint64_t offset, ConstBytes data);
Result<> write(Disk& disk, ModelDisk& model, uint64_t offset, uint64_t length, uint64_t seed);
Result<> zero(Disk& disk, ModelDisk& model, GuestRange range, Zeroing zeroing);
Result<> flush(Disk& disk, ModelDisk& model);

/// The model of the parts of the disk that operations may touch: clusters 0 to 75, and two on either side of 2 MiB.
ModelDisk model_of(const Situation& s);

/// Images that a crash at this moment may leave have no corruptions, open, and read as the model allows. `data` is the
/// external data file, where there is one.
void check_crashed(const CrashStorage& storage, const ModelDisk& model, const Situation& s, Rng& rng,
                   const CrashStorage* data = nullptr);

/// Fails the n-th call of the operation in every way, for n = 1, 2, … until it runs through; calls of the image's
/// storage, and then of the data file's. The disk then works on and
/// is consistent, or refuses every change; and at no moment a crash loses what was acknowledged.
void fail_everywhere(const Situation& situation, const Operation& operation);

/// Does `before`, and fails the n-th call of closing then, for every n: either closing fails, or all is durable.
void fail_closing(const Situation& situation, const Operation& before);

}  // namespace imgfuse::test
