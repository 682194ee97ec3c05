// Writes that are stored compressed.
#include <doctest/doctest.h>

#include <thread>

#include "bytes.h"
#include "faults.h"
#include "imgfuse/snapshots.h"
#include "qemu.h"
#include "support/intercepted_storage.h"
#include "support/order_storage.h"
#include "support/qcow2_view.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kCluster = 4096;
constexpr uint64_t kSize = 1_MiB + 1536;  // ends inside a cluster

Qcow2Spec spec(uint32_t refcount_bits = 16) {
  return {.size = kSize, .cluster_size = kCluster, .refcount_bits = refcount_bits};
}

WatchedDisk open_compressing(const MemImage& image, const OpenSpec& options = {}) {
  OpenSpec with = options;
  with.compress = "zlib";
  return open_watched(image, with);
}

/// The L2 entry of a guest cluster, of an image with one L2 table.
uint64_t entry(const MemImage& image, uint64_t cluster) {
  const uint64_t l1 = peek<uint64_t>(image, peek<uint64_t>(image, 40));
  return peek<uint64_t>(image, (l1 & kAddressBits) + cluster * 8);
}

bool is_compressed(const MemImage& image, uint64_t cluster) { return (entry(image, cluster) & kCompressedBit) != 0; }
uint64_t place(const MemImage& image, uint64_t cluster) { return entry(image, cluster) & ((uint64_t{1} << 56) - 1); }
uint64_t count_at(const MemImage& image, uint64_t offset) { return Qcow2View::parse(image)->count(offset / kCluster); }

/// Closed, without leaks or corruptions in our eyes and QEMU's, and reads as `content`.
void check_whole(const WatchedDisk& disk, const std::vector<std::byte>& content, const MemImage& backing = {}) {
  CHECK(read_all(*disk.disk, GuestOffset(0), kSize) == content);
  must(disk->close());
  const MemImage image = disk.memory->image();
  const CheckReport report = check_image(image);
  CHECK(report.corruptions == 0);
  CHECK(report.leaks == 0);
  auto again = must(open_qcow2(std::make_shared<MemStorage>(image), {.read_only = true, .backing = backing}));
  CHECK(read_all(*again, GuestOffset(0), kSize) == content);
  must(again->close());
}

void put(std::vector<std::byte>& content, uint64_t offset, const std::vector<std::byte>& data) {
  std::copy(data.begin(), data.end(), content.begin() + static_cast<ptrdiff_t>(offset));
}

TEST_CASE("qcow2: a host cluster of compressed ones is punched when the last of them is discarded") {
  const WatchedDisk disk = open_compressing(make_qcow2(spec()));
  must(disk->write(GuestOffset(0), loose_pattern(64 * kCluster, 1)));
  must(disk->flush());
  const uint64_t full = disk.memory->image().allocated();
  REQUIRE(full > 20 * kCluster);

  must(disk->discard({GuestOffset(kCluster), 62 * kCluster}));  // the first and the last keep their host clusters
  must(disk->flush());
  CHECK(disk.memory->image().allocated() < full - 15 * kCluster);
  std::vector<std::byte> content(kSize);
  const auto data = loose_pattern(64 * kCluster, 1);
  std::copy(data.begin(), data.begin() + kCluster, content.begin());
  std::copy(data.end() - kCluster, data.end(), content.begin() + 63 * kCluster);
  CHECK(read_all(*disk.disk, GuestOffset(0), kSize) == content);

  const auto more = loose_pattern(8 * kCluster, 2);  // goes behind the last stream
  must(disk->write(GuestOffset(10 * kCluster), more));
  put(content, 10 * kCluster, more);
  must(disk->flush());
  must(disk->discard({GuestOffset(0), kSize}));
  must(disk->flush());
  must(disk->write(GuestOffset(10 * kCluster), more));
  std::fill(content.begin(), content.end(), std::byte{0});
  put(content, 10 * kCluster, more);
  check_whole(disk, content);
}

TEST_CASE("qcow2: whole clusters that are written are stored compressed, several in a host cluster") {
  const WatchedDisk disk = open_compressing(make_qcow2(spec()));
  std::vector<std::byte> content(kSize);
  const auto data = loose_pattern(8 * kCluster, 1);
  put(content, 2 * kCluster, data);

  must(disk->write(GuestOffset(2 * kCluster), data));

  must(disk->flush());
  const MemImage image = disk.memory->image();
  for (uint64_t cluster = 2; cluster < 10; ++cluster) CHECK(is_compressed(image, cluster));
  CHECK(place(image, 2) / kCluster == place(image, 3) / kCluster);
  CHECK(count_at(image, place(image, 2)) > 2);
  CHECK(place(image, 9) - place(image, 2) < 3 * kCluster);
  check_whole(disk, content);
}

TEST_CASE("qcow2: streams follow each other from request to request") {
  const WatchedDisk disk = open_compressing(make_qcow2(spec()));

  for (uint64_t cluster = 0; cluster < 4; ++cluster)
    must(disk->write(GuestOffset(cluster * kCluster), loose_pattern(kCluster, cluster)));

  must(disk->flush());
  for (uint64_t cluster = 1; cluster < 4; ++cluster) {
    const uint64_t distance = place(disk.memory->image(), cluster) - place(disk.memory->image(), cluster - 1);
    CHECK(distance > 1000);
    CHECK(distance < 1500);
  }
  must(disk->close());
}

TEST_CASE("qcow2: a host cluster holds no more streams than its count can say") {
  for (const uint32_t bits : {1u, 2u, 4u}) {
    CAPTURE(bits);
    const WatchedDisk disk = open_compressing(make_qcow2(spec(bits)));
    std::vector<std::byte> content(kSize);
    const std::vector<std::byte> tiny = loose_pattern(16, 3);
    for (uint64_t i = 0; i < 64 * kCluster; i += 16) put(content, i, tiny);

    must(disk->write(GuestOffset(0), ConstBytes(content).first(64 * kCluster)));

    must(disk->flush());
    const MemImage image = disk.memory->image();
    uint64_t largest = 0;
    for (uint64_t cluster = 0; cluster < 64; ++cluster)
      largest = std::max(largest, count_at(image, place(image, cluster)));
    CHECK(largest == (uint64_t{1} << bits) - 1);
    check_whole(disk, content);
  }
}

TEST_CASE("qcow2: what compression does not make smaller is stored as it is, and zeros take no space") {
  const WatchedDisk disk = open_compressing(make_qcow2(spec()));
  std::vector<std::byte> content(kSize);
  put(content, 0, loose_pattern(2 * kCluster, 1));
  put(content, 2 * kCluster, pattern(2 * kCluster, 2));
  put(content, 6 * kCluster, loose_pattern(kCluster, 3));
  must(disk->write(GuestOffset(4 * kCluster), pattern(kCluster, 4)));  // to be zeroed

  must(disk->write(GuestOffset(0), ConstBytes(content).first(7 * kCluster)));

  must(disk->flush());
  const MemImage image = disk.memory->image();
  for (const uint64_t cluster : {0, 1, 6}) CHECK(is_compressed(image, cluster));
  for (const uint64_t cluster : {2, 3}) CHECK((entry(image, cluster) & kCopiedBit) != 0);
  CHECK(entry(image, 4) == 1);
  CHECK(entry(image, 5) == 0);
  check_whole(disk, content);
}

TEST_CASE("qcow2: zeros over a backing file hide it") {
  MemImage backing;
  backing.write(0, pattern(kSize, 9));
  for (const uint32_t version : {2u, 3u}) {
    CAPTURE(version);
    Qcow2Spec with_backing = spec();
    with_backing.backing = "base";
    with_backing.version = version;
    const WatchedDisk disk = open_compressing(make_qcow2(with_backing), {.backing = backing});
    std::vector<std::byte> content = pattern(kSize, 9);
    put(content, 3 * kCluster, std::vector<std::byte>(5 * kCluster));

    must(disk->write(GuestOffset(3 * kCluster), std::vector<std::byte>(5 * kCluster)));

    must(disk->flush());
    CHECK(is_compressed(disk.memory->image(), 4) == (version == 2));
    check_whole(disk, content, backing);
  }
}

TEST_CASE("qcow2: the cluster that the end of the disk cuts is compressed too") {
  const WatchedDisk disk = open_compressing(make_qcow2(spec()));
  std::vector<std::byte> content(kSize);
  put(content, 1_MiB - kCluster, loose_pattern(kCluster + 1536, 5));

  must(disk->write(GuestOffset(1_MiB - kCluster), ConstBytes(content).last(kCluster + 1536)));

  must(disk->flush());
  CHECK(is_compressed(disk.memory->image(), 256));
  must(disk->resize(kSize + 1024));
  CHECK(read_all(*disk.disk, GuestOffset(kSize), 1024) == std::vector<std::byte>(1024));
  check_whole(disk, content);
}

TEST_CASE("qcow2: a write to a part of a compressed cluster keeps the rest of it") {
  const WatchedDisk disk = open_compressing(make_qcow2(spec()));
  std::vector<std::byte> content(kSize);
  put(content, 0, loose_pattern(6 * kCluster, 1));
  must(disk->write(GuestOffset(0), ConstBytes(content).first(6 * kCluster)));
  put(content, kCluster + 100, loose_pattern(3 * kCluster, 2));

  must(disk->write(GuestOffset(kCluster + 100), ConstBytes(content).subspan(kCluster + 100, 3 * kCluster)));

  must(disk->flush());
  const MemImage image = disk.memory->image();
  for (const uint64_t cluster : {0, 2, 3, 5}) CHECK(is_compressed(image, cluster));
  for (const uint64_t cluster : {1, 4}) CHECK_FALSE(is_compressed(image, cluster));
  check_whole(disk, content);
}

TEST_CASE("qcow2: host clusters of streams that nobody points at any more are free") {
  const WatchedDisk disk = open_compressing(make_qcow2(spec()));
  std::vector<std::byte> content(kSize);
  const auto data = loose_pattern(64 * kCluster, 1);
  must(disk->write(GuestOffset(0), data));
  must(disk->flush());
  const uint64_t size = must(disk.memory->size());

  for (uint64_t round = 0; round < 5; ++round) {
    must(disk->discard({GuestOffset(0), 64 * kCluster}));
    must(disk->flush());
    put(content, 0, loose_pattern(64 * kCluster, round));
    must(disk->write(GuestOffset(0), ConstBytes(content).first(64 * kCluster)));
    must(disk->flush());
  }

  CHECK(must(disk.memory->size()) <= size + 2 * kCluster);
  check_whole(disk, content);
}

TEST_CASE("qcow2: the partly filled host cluster is not filled further after it was freed") {
  const WatchedDisk disk = open_compressing(make_qcow2(spec()));
  std::vector<std::byte> content(kSize);
  must(disk->write(GuestOffset(0), loose_pattern(kCluster, 1)));
  must(disk->discard({GuestOffset(0), kCluster}));
  must(disk->flush());
  put(content, 5 * kCluster, pattern(kCluster, 2));
  must(disk->write(GuestOffset(5 * kCluster), pattern(kCluster, 2)));  // takes the freed host cluster
  put(content, 9 * kCluster, loose_pattern(kCluster, 3));

  must(disk->write(GuestOffset(9 * kCluster), loose_pattern(kCluster, 3)));

  must(disk->flush());
  CHECK(place(disk.memory->image(), 9) / kCluster != (entry(disk.memory->image(), 5) & kAddressBits) / kCluster);
  check_whole(disk, content);
}

TEST_CASE("qcow2: nor after it was freed with a snapshot") {
  const WatchedDisk disk = open_compressing(make_qcow2(spec()));
  std::vector<std::byte> content(kSize);
  must(disk->write(GuestOffset(0), loose_pattern(kCluster, 1)));
  Snapshots* const snapshots = disk->snapshots();
  REQUIRE(snapshots);
  must(snapshots->create("one"));
  must(disk->discard({GuestOffset(0), kCluster}));
  must(disk->flush());
  must(snapshots->remove("one"));
  put(content, 5 * kCluster, pattern(9 * kCluster, 2));
  must(disk->write(GuestOffset(5 * kCluster), pattern(9 * kCluster, 2)));  // takes the freed host cluster
  put(content, 20 * kCluster, loose_pattern(kCluster, 3));

  must(disk->write(GuestOffset(20 * kCluster), loose_pattern(kCluster, 3)));

  check_whole(disk, content);
}

TEST_CASE("qcow2: clusters shared with a snapshot are compressed anew") {
  const WatchedDisk disk = open_compressing(make_qcow2(spec()));
  std::vector<std::byte> content(kSize);
  const auto old = loose_pattern(9 * kCluster, 1);
  must(disk->write(GuestOffset(0), old));
  must(disk->snapshots()->create("one"));
  put(content, 0, old);
  put(content, 3 * kCluster, loose_pattern(4 * kCluster, 2));

  must(disk->write(GuestOffset(3 * kCluster), loose_pattern(4 * kCluster, 2)));

  CHECK(read_all(*must(disk->snapshots()->open("one")), GuestOffset(0), 9 * kCluster) == old);
  check_whole(disk, content);
}

TEST_CASE("qcow2: neighbouring streams of a request are written at once") {
  const WatchedDisk disk = open_compressing(make_qcow2(spec()));
  must(disk->write(GuestOffset(0), loose_pattern(kCluster, 1)));  // the tables are there
  disk.memory->counts().reset();

  must(disk->write(GuestOffset(kCluster), loose_pattern(40 * kCluster, 2)));

  CHECK(disk.memory->counts().writes == 1);
  must(disk->close());
}

TEST_CASE("qcow2: compression must be the image's") {
  const MemImage image = make_qcow2(spec());
  for (const std::string wrong : {"zstd", "lzma"}) {
    const auto disk = open_qcow2(std::make_shared<MemStorage>(image), {.compress = wrong});
    REQUIRE_FALSE(disk);
    CHECK(disk.error().text().find(wrong) != std::string::npos);
    CHECK(disk.error().text().find("zlib") != std::string::npos);
  }
}

TEST_CASE("qcow2: QEMU reads what was compressed here") {
  if (!have_qemu()) return;
  for (const std::string type : {"zlib", "zstd"}) {
    CAPTURE(type);
    Qcow2Spec typed = spec();
    typed.compression = type;
    const WatchedDisk disk = open_watched(make_qcow2(typed), {.compress = type});
    MemImage content;
    content.write(0, loose_pattern(kSize, 1));
    content.write(50 * kCluster, pattern(4 * kCluster, 1));
    content.zero(60 * kCluster, 4 * kCluster);
    must(disk->write(GuestOffset(0), read_all(*make_raw_disk(content), GuestOffset(0), kSize)));
    must(disk->close());

    const MemImage image = disk.memory->image();
    const QemuCheck check = qemu_check(image);
    CHECK(check.status == 0);
    CHECK(check.report.compressed_clusters > 200);
    const MemImage raw = after_command(image, "qemu-img convert -f qcow2 -O raw {} {}.raw && mv {}.raw {}");
    CHECK(read_all(*make_raw_disk(raw), GuestOffset(0), kSize) ==
          read_all(*make_raw_disk(content), GuestOffset(0), kSize));
  }
}

TEST_CASE("qcow2: what QEMU compressed is written to and read by QEMU again") {
  if (!have_qemu()) return;
  for (const std::string type : {"zlib", "zstd"}) {
    CAPTURE(type);
    MemImage content;
    content.write(0, loose_pattern(1_MiB, 1));
    const MemImage image =
        after_command(content, "qemu-img convert -c -f raw -O qcow2 -o cluster_size=4096,compression_type=" + type +
                                   " {} {}.new && mv {}.new {}");
    const WatchedDisk disk = open_watched(image, {.compress = type});
    for (const uint64_t at : {3 * kCluster, 40 * kCluster + 700}) {
      must(disk->write(GuestOffset(at), loose_pattern(9 * kCluster, at)));
      content.write(at, loose_pattern(9 * kCluster, at));
    }
    must(disk->discard({GuestOffset(100 * kCluster), 9 * kCluster}));
    content.zero(100 * kCluster, 9 * kCluster);
    must(disk->close());

    CHECK(qemu_check(disk.memory->image()).status == 0);
    const MemImage raw =
        after_command(disk.memory->image(), "qemu-img convert -f qcow2 -O raw {} {}.raw && mv {}.raw {}");
    CHECK(read_all(*make_raw_disk(raw), GuestOffset(0), 1_MiB) ==
          read_all(*make_raw_disk(content), GuestOffset(0), 1_MiB));
  }
}

TEST_CASE("qcow2: threads may compress side by side") {
  const WatchedDisk disk = open_compressing(make_qcow2(spec()));
  std::vector<std::byte> content(kSize);
  put(content, 0, loose_pattern(240 * kCluster, 1));
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      for (uint64_t round = 0; round < 6; ++round)
        for (uint64_t at = i * 60; at < (i + 1) * 60; at += 5) {
          must(disk->write(GuestOffset(at * kCluster), ConstBytes(content).subspan(at * kCluster, 5 * kCluster)));
          if (at % 20 == 0) must(disk->flush());
          if (round < 5 && at % 3 == 0) must(disk->discard({GuestOffset(at * kCluster), 5 * kCluster}));
        }
    });
  for (std::thread& thread : threads) thread.join();

  must(disk->flush());
  check_whole(disk, content);
}

// ---- Failures

Situation compressing() {
  Situation s;
  s.compress = "zlib";
  s.content.resize(s.size);
  s.content.write(0, loose_pattern(30 * kCluster, 5));
  s.image = make_qcow2({.size = s.size, .cluster_size = kCluster});
  const WatchedDisk disk = open_compressing(s.image);
  must(disk->write(GuestOffset(0), loose_pattern(30 * kCluster, 5)));
  must(disk->close());
  s.image = disk.memory->image();
  return s;
}

TEST_CASE("qcow2: a compressed write may fail at any call") {
  fail_everywhere(compressing(), {"write", [](Disk& disk, ModelDisk& model) -> Result<> {
                                    IMG_TRY(write(disk, model, 50 * kCluster, loose_pattern(3 * kCluster, 1)));
                                    return write(disk, model, 55 * kCluster, loose_pattern(2 * kCluster, 2));
                                  }});
}

TEST_CASE("qcow2: a compressed write to two L2 tables may fail at any call") {
  fail_everywhere(compressing(), {"write", [](Disk& disk, ModelDisk& model) {
                                    return write(disk, model, 2_MiB - kCluster, loose_pattern(3 * kCluster, 1));
                                  }});
}

TEST_CASE("qcow2: overwriting compressed clusters may fail at any call") {
  fail_everywhere(compressing(), {"overwrite", [](Disk& disk, ModelDisk& model) -> Result<> {
                                    IMG_TRY(write(disk, model, 3 * kCluster, loose_pattern(4 * kCluster, 1)));
                                    IMG_TRY(write(disk, model, 10 * kCluster + 99, loose_pattern(3 * kCluster, 2)));
                                    IMG_TRY(flush(disk, model));
                                    return write(disk, model, 20 * kCluster, loose_pattern(kCluster, 2));
                                  }});
}

/// A host object that cannot grow.
class Device final : public InterceptedStorage {
 public:
  explicit Device(const std::shared_ptr<Storage>& inner)
      : InterceptedStorage(inner), info_{.name = "device", .writable = true, .extensible = false} {}
  const StorageInfo& info() const override { return info_; }

 private:
  const StorageInfo info_;
};

TEST_CASE("qcow2: a full device is an error of the write only, and quarantine makes room") {
  auto memory = std::make_shared<MemStorage>(compressing().image);
  must(memory->resize(must(memory->size()) + 6 * kCluster));
  auto disk = must(open_qcow2(std::make_shared<OrderStorage>(std::make_shared<Device>(memory), memory->image()),
                              {.compress = "zlib"}));
  Result<> result;
  for (uint64_t at = 40; result && at < 80; ++at)
    result = disk->write(GuestOffset(at * kCluster), loose_pattern(kCluster, at));
  REQUIRE_FALSE(result);
  CHECK(result.error().code() == ErrorCode::no_space);
  must(disk->discard({GuestOffset(0), 30 * kCluster}));

  must(disk->write(GuestOffset(100 * kCluster), loose_pattern(kCluster, 1)));

  CHECK(read_all(*disk, GuestOffset(100 * kCluster), kCluster) == loose_pattern(kCluster, 1));
  must(disk->close());
  CHECK(check_image(memory->image()).corruptions == 0);
  CHECK(check_image(memory->image()).leaks == 0);
}

}  // namespace
}  // namespace imgfuse::test
