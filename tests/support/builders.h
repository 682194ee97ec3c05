// Images and disks for tests, in one line each.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "format/fvd/fvd.h"
#include "format/qcow2/qcow2.h"
#include "format/qed/qed.h"
#include "support/mem_storage.h"
#include "support/must.h"
#include "support/random.h"

namespace imgfuse::test {

struct Qcow2Spec {
  uint64_t size = 64_MiB;
  uint32_t cluster_size = 65536;
  uint32_t refcount_bits = 16;
  uint32_t version = 3;
  std::optional<std::string> backing;  ///< name of a raw backing file
  std::string compression = "zlib";
  bool extended_l2 = false;
  bool lazy_refcounts = false;
  bool data_file = false;  ///< guest data lies in another storage: OpenSpec::data
  bool data_file_raw = false;
};

/// A fresh qcow2 image.
MemImage make_qcow2(const Qcow2Spec& spec);

struct QedSpec {
  uint64_t size = 64_MiB;
  uint32_t cluster_size = 65536;
  uint32_t table_size = 4;             ///< clusters; also those that QEMU cannot open
  std::optional<std::string> backing;  ///< name of a raw backing file
};

/// A fresh QED image.
MemImage make_qed(const QedSpec& spec);

struct FvdSpec {
  uint64_t size = 8_MiB;
  bool base = false;  ///< of the size `base_size`, named `base_name`
  uint64_t base_size = 0;
  FvdCreateOptions own = {};
  std::optional<std::string> data_file = {};  ///< guest data lies in another storage: OpenSpec::data
  std::string base_name = "base.raw";
};

/// A fresh FVD image.
MemImage make_fvd(const FvdSpec& spec);

/// A read-only raw disk.
std::unique_ptr<Disk> make_raw_disk(MemImage content);

struct OpenSpec {
  bool read_only = false;
  uint64_t metadata_cache = 1_MiB;
  MemImage backing;  ///< what every backing file reads as
  std::optional<std::string> compress;
  uint64_t compressed_cache = 256_KiB;  ///< small, so that clusters leave it
  std::shared_ptr<Storage> data;        ///< the external data file
  Clock* clock = &Clock::steady();
};

/// qcow2::open with a raw backing disk.
Result<std::unique_ptr<Disk>> open_qcow2(std::shared_ptr<Storage> storage, const OpenSpec& spec = {});

Result<std::unique_ptr<Disk>> open_fvd(std::shared_ptr<Storage> storage, const OpenSpec& spec = {});

/// The same for an image of any format but raw; its first bytes tell which.
Result<std::unique_ptr<Disk>> open_image(std::shared_ptr<Storage> storage, const OpenSpec& spec = {});

/// What images of every format have.
struct ImageSpec {
  uint64_t size = 64_MiB;
  uint32_t cluster_size = 65536;
  std::optional<std::string> backing = {};    ///< name of a raw backing file
  std::optional<uint64_t> backing_size = {};  ///< FVD keeps it; default: the disk's
};

/// The formats that tests of what they share are run for, as the types of a TEST_CASE_TEMPLATE. An L2 table has the
/// size of a cluster, 8 bytes for each cluster that it maps.
struct Qcow2Kind {
  static constexpr uint32_t kSmallestCluster = 512;
  static constexpr uint64_t kAutoclearAt = 95;  ///< a byte of unknown autoclear bits
  static MemImage image(const ImageSpec& spec = {});
  /// With whatever else there is to choose.
  static MemImage any_image(const ImageSpec& spec, Rng& rng);
};
struct QedKind {
  static constexpr uint32_t kSmallestCluster = 4096;
  static constexpr uint64_t kAutoclearAt = 32;
  static MemImage image(const ImageSpec& spec = {});
  static MemImage any_image(const ImageSpec& spec, Rng& rng);
};
/// A compact image whose chunks are the clusters, and its blocks too, where it has a base.
struct FvdKind {
  static constexpr uint32_t kSmallestCluster = 4096;
  static MemImage image(const ImageSpec& spec = {});
  static MemImage any_image(const ImageSpec& spec, Rng& rng);
};
/// A fresh image of any format, a raw one too.
MemImage make_image(std::string_view format, const ImageSpec& spec);

/// Those whose tables are read when they are needed, and have a place for bits that nobody knows.
#define IMG_EVERY_TABLE_KIND imgfuse::test::Qcow2Kind, imgfuse::test::QedKind
#define IMG_EVERY_KIND IMG_EVERY_TABLE_KIND, imgfuse::test::FvdKind

/// A disk over memory whose order of writes is watched.
struct WatchedDisk {
  std::shared_ptr<MemStorage> memory;
  std::unique_ptr<Disk> disk;
  Disk* operator->() const { return disk.get(); }
};
WatchedDisk open_watched(const MemImage& image, const OpenSpec& spec = {});

/// The image as opening it for writing and closing it leaves it: repaired where counts were postponed.
MemImage reopened(const MemImage& image, const OpenSpec& spec = {});

/// Puts an internal snapshot into the image, with qemu-img; nothing if that is not installed.
std::optional<MemImage> with_snapshot(const MemImage& image);

/// The format's check without repair. The findings are part of the messages of a failed test.
CheckReport check_image(const MemImage& image);

std::vector<std::byte> read_all(Disk& disk, GuestOffset offset, size_t length);

}  // namespace imgfuse::test
