// OrderStorage itself: it lets the right order pass, and names what is wrong with every other.
#include <doctest/doctest.h>

#include <future>

#include "base/endian.h"
#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/gate_storage.h"
#include "support/order_storage.h"

namespace imgfuse::test {
namespace {

constexpr uint64_t kCluster = 4096;
constexpr uint64_t kCopiedFlag = uint64_t{1} << 63;
constexpr uint64_t kZeroFlag = 1;

/// Writes qcow2 structures by hand, with 16 bit counts, into an image without data.
class Hand {
 public:
  explicit Hand(bool lazy = false)
      : memory_(std::make_shared<MemStorage>(
            make_qcow2({.size = 16_MiB, .cluster_size = kCluster, .lazy_refcounts = lazy}))),
        storage_(gates_, memory_->image(), [this](const std::string& text) { wrong.push_back(text); }) {
    const MemImage image = memory_->image();
    block_ = load(load(48));
    l1_ = load(40);
    next_ = image.size() / kCluster + 1;
  }

  uint64_t new_cluster() { return next_++; }
  void count(uint64_t cluster, uint16_t value) { put(block_ + cluster * 2, be<uint16_t>(value)); }
  void fill(uint64_t cluster, uint64_t seed) { write(cluster * kCluster, pattern(kCluster, seed)); }
  void clear(uint64_t cluster) { write(cluster * kCluster, std::vector<std::byte>(kCluster)); }
  void describe_itself(uint64_t block) {
    std::vector<std::byte> counts(kCluster);
    counts[1] = std::byte{1};
    write(block * kCluster, counts);
  }
  void l1(uint64_t index, uint64_t to) { put(l1_ + index * 8, be<uint64_t>(to ? to * kCluster | kCopiedFlag : 0)); }
  void l2(uint64_t in, uint64_t index, uint64_t cluster) {
    put(in * kCluster + index * 8, be<uint64_t>(cluster ? cluster * kCluster | kCopiedFlag : 0));
  }
  void l2_zero(uint64_t in, uint64_t index, uint64_t cluster) {
    put(in * kCluster + index * 8, be<uint64_t>(cluster * kCluster | kCopiedFlag | kZeroFlag));
  }
  void discard(uint64_t cluster) { must(storage_.discard({HostOffset(cluster * kCluster), kCluster})); }
  void refcount_table(uint64_t index, uint64_t block) { put(load(48) + index * 8, be<uint64_t>(block * kCluster)); }
  void dirty_bit(bool on) { put(72, be<uint64_t>(on ? 1 : 0)); }
  void lengthen(uint64_t clusters) { must(storage_.resize(clusters * kCluster)); }
  void flush() { must(storage_.flush()); }

  /// A flush that is under way until the test opens its gate.
  std::shared_ptr<Gate> hold_flush() { return gates_->hold(Call::flush); }

  /// A table in L1 entry 0 with a data cluster behind entry 0, all durable.
  void link_one() {
    table = new_cluster();
    data = new_cluster();
    clear(table);
    fill(data, 1);
    count(table, 1);
    count(data, 1);
    flush();
    l2(table, 0, data);
    l1(0, table);
    flush();
  }

  std::vector<std::string> wrong;
  uint64_t table = 0;
  uint64_t data = 0;

 private:
  uint64_t load(uint64_t offset) {
    be<uint64_t> value;
    must(memory_->read(HostOffset(offset), std::as_writable_bytes(std::span(&value, 1))));
    return value;
  }
  template <class T>
  void put(uint64_t offset, T value) {
    must(storage_.write(HostOffset(offset), std::as_bytes(std::span(&value, 1))));
  }
  void write(uint64_t offset, const std::vector<std::byte>& bytes) { must(storage_.write(HostOffset(offset), bytes)); }

  std::shared_ptr<MemStorage> memory_;
  std::shared_ptr<GateStorage> gates_ = std::make_shared<GateStorage>(memory_);
  OrderStorage storage_;
  uint64_t block_ = 0;
  uint64_t l1_ = 0;
  uint64_t next_ = 0;
};

std::string first_wrong(const Hand& hand) { return hand.wrong.empty() ? "" : hand.wrong.front().substr(0, 2); }

TEST_CASE("OrderStorage: allocating, un-mapping and freeing in the right order pass") {
  Hand hand;
  hand.link_one();
  hand.fill(hand.data, 2);  // in place
  hand.flush();
  hand.l2(hand.table, 0, 0);
  hand.flush();
  hand.discard(hand.data);
  hand.count(hand.data, 0);
  hand.flush();

  CHECK(first_wrong(hand) == "");
}

TEST_CASE("OrderStorage: I1, an entry before its count is durable") {
  Hand hand;
  hand.link_one();
  const uint64_t data = hand.new_cluster();
  hand.fill(data, 2);
  hand.flush();
  hand.count(data, 1);
  hand.l2(hand.table, 1, data);

  CHECK(first_wrong(hand) == "I1");
}

TEST_CASE("OrderStorage: I2, an entry before its data is durable") {
  Hand hand;
  hand.link_one();
  const uint64_t data = hand.new_cluster();
  hand.count(data, 1);
  hand.flush();
  hand.fill(data, 2);
  hand.l2(hand.table, 1, data);

  CHECK(first_wrong(hand) == "I2");
}

TEST_CASE("OrderStorage: I3, an L1 entry before its table is durable") {
  Hand hand;
  const uint64_t table = hand.new_cluster();
  hand.count(table, 1);
  hand.flush();
  hand.clear(table);
  hand.l1(0, table);

  CHECK(first_wrong(hand) == "I3");
}

TEST_CASE("OrderStorage: I4, a cluster is written while a durable entry shows it for something else") {
  Hand hand;
  hand.link_one();
  hand.l2(hand.table, 0, 0);
  hand.fill(hand.data, 2);

  CHECK(first_wrong(hand) == "I4");
}

TEST_CASE("OrderStorage: I4, a hole is punched before the un-mapping is durable") {
  Hand hand;
  hand.link_one();
  hand.l2(hand.table, 0, 0);
  hand.discard(hand.data);

  CHECK(first_wrong(hand) == "I4");
}

TEST_CASE("OrderStorage: I4, a cluster is linked that still holds a former owner's data") {
  Hand hand;
  hand.link_one();
  hand.fill(hand.data, 2);  // for its next owner, too early
  hand.flush();
  hand.l2(hand.table, 0, 0);
  hand.flush();
  hand.l2(hand.table, 1, hand.data);

  CHECK(first_wrong(hand) == "I4");
}

TEST_CASE("OrderStorage: I1, a cluster changes its owner within one flush") {
  Hand hand;
  hand.link_one();
  hand.l2(hand.table, 0, 0);
  hand.l2(hand.table, 1, hand.data);

  CHECK(first_wrong(hand) == "I1");
}

TEST_CASE("OrderStorage: I5, a count is lowered before the un-mapping is durable") {
  Hand hand;
  hand.link_one();
  hand.l2(hand.table, 0, 0);
  hand.count(hand.data, 0);

  CHECK(first_wrong(hand) == "I5");
}

TEST_CASE("OrderStorage: I6, a refcount table entry before its block is durable") {
  Hand hand;
  const uint64_t block = kCluster / 2;  // the first cluster that the second block counts: itself

  SUBCASE("in the right order") {
    hand.describe_itself(block);
    hand.flush();
    hand.refcount_table(1, block);
    CHECK(first_wrong(hand) == "");
  }
  SUBCASE("in the wrong order") {
    hand.describe_itself(block);
    hand.refcount_table(1, block);
    CHECK(first_wrong(hand) == "I6");
  }
  SUBCASE("without a count of its own") {
    hand.clear(block);
    hand.flush();
    hand.refcount_table(1, block);
    CHECK(first_wrong(hand) == "I6");
  }
}

TEST_CASE("OrderStorage: a refcount block counts itself although a flush that began before its entry has ended") {
  Hand hand;
  const uint64_t block = kCluster / 2;
  hand.describe_itself(block);
  hand.flush();
  const auto gate = hand.hold_flush();
  std::future<void> flush = std::async(std::launch::async, [&] { hand.flush(); });
  gate->wait_for_arrival();
  hand.refcount_table(1, block);
  gate->open();
  flush.get();
  hand.count(hand.new_cluster(), 1);  // looks at all counts again

  CHECK(first_wrong(hand) == "");
}

TEST_CASE("OrderStorage: I1, a count may wait while the dirty bit is durable, and no longer") {
  for (const bool durable : {false, true}) {
    Hand hand(true);
    hand.link_one();
    if (durable) hand.dirty_bit(true);
    const uint64_t data = hand.new_cluster();
    hand.fill(data, 2);
    hand.flush();
    if (!durable) hand.dirty_bit(true);
    hand.l2(hand.table, 1, data);
    CHECK(first_wrong(hand) == (durable ? "" : "I1"));
    if (!durable) continue;
    hand.flush();
    hand.dirty_bit(false);
    CHECK(first_wrong(hand) == "I1");
  }
}

TEST_CASE("OrderStorage: I2, an entry before its data, where a crash leaves zeros or may leave anything else") {
  for (const bool lengthened : {false, true}) {
    Hand hand(true);
    hand.link_one();
    const uint64_t data = hand.new_cluster();
    hand.dirty_bit(true);
    if (lengthened) hand.lengthen(data + 1);
    hand.flush();
    hand.fill(data, 2);
    hand.l2(hand.table, 1, data);
    CHECK(first_wrong(hand) == (lengthened ? "" : "I2"));
  }
}

TEST_CASE("OrderStorage: I2, a cluster that is kept as zeros is shown again before its data is durable") {
  Hand hand;
  hand.link_one();
  const auto zero_and_write_again = [&] {
    hand.l2_zero(hand.table, 0, hand.data);
    hand.flush();
    hand.fill(hand.data, 3);
    hand.l2(hand.table, 0, hand.data);
  };

  SUBCASE("written after the zeros are durable") {
    zero_and_write_again();
    CHECK(first_wrong(hand) == "I2");
  }
  SUBCASE("written long before, and again") {
    hand.fill(hand.data, 2);
    hand.flush();
    hand.flush();
    zero_and_write_again();
    CHECK(first_wrong(hand) == "I2");
  }
  SUBCASE("written after it was zeroed, and then over that") {
    hand.fill(hand.data, 2);
    SUBCASE("durable one flush before the zeros") { hand.flush(); }
    SUBCASE("durable together with the zeros") {}
    zero_and_write_again();
    CHECK(first_wrong(hand) == "");
  }
  SUBCASE("by another owner, who has not written it") {
    hand.fill(hand.data, 2);
    hand.l2_zero(hand.table, 0, hand.data);
    hand.flush();
    hand.l2(hand.table, 0, 0);
    hand.flush();
    hand.l2(hand.table, 1, hand.data);
    CHECK(first_wrong(hand) == "I4");
  }
}

TEST_CASE("OrderStorage: clusters of a snapshot are not written in place") {
  const WatchedDisk disk = open_watched(make_qcow2({}));
  must(disk->write(GuestOffset(0), pattern(65536)));
  const HostOffset host = must(disk->map({GuestOffset(0), 512})).at(0).host;
  must(disk->close());
  const std::optional<MemImage> image = with_snapshot(disk.memory->image());
  if (!image) return;
  std::string wrong;
  OrderStorage storage(std::make_shared<MemStorage>(*image), *image, [&](const std::string& text) { wrong = text; });

  must(storage.write(host, pattern(512)));

  CHECK(wrong.substr(0, 2) == "I4");
}

TEST_CASE("CrashStorage: a flush makes durable what was written before it, and nothing else") {
  CrashStorage storage;
  Rng rng(1);
  const auto one = pattern(512, 1);
  const auto two = pattern(512, 2);
  must(storage.write(HostOffset(0), one));
  must(storage.flush());
  must(storage.write(HostOffset(512), two));

  for (const CrashMode mode : kCrashModes) {
    std::vector<std::byte> found(512);
    const MemImage crashed = storage.crash(mode, rng);
    crashed.read(0, found);
    CHECK(found == one);
    crashed.read(512, found);
    CHECK((found == two || found == std::vector<std::byte>(512)));
  }
  CHECK(storage.crash(CrashMode::none, rng).size() == 512);
  CHECK(storage.crash(CrashMode::all, rng).size() == 1024);
}

TEST_CASE("CrashStorage: a torn write leaves whole sectors, old or new") {
  CrashStorage storage;
  const auto old = pattern(4096, 1);
  const auto next = pattern(4096, 2);
  must(storage.write(HostOffset(0), old));
  must(storage.flush());
  must(storage.write(HostOffset(100), ConstBytes(next).subspan(100, 3900)));

  bool mixed = false;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    Rng rng(seed);
    const MemImage crashed = storage.crash(CrashMode::torn, rng);
    int fresh = 0;
    for (uint64_t at = 0; at < 4096; at += 512) {
      std::vector<std::byte> found(512);
      std::vector<std::byte> expected(512);
      crashed.read(at, found);
      storage.image().read(at, expected);
      const bool is_new = found == expected;
      fresh += is_new;
      if (!is_new) CHECK(std::equal(found.begin(), found.end(), old.begin() + static_cast<ptrdiff_t>(at)));
    }
    mixed |= fresh > 0 && fresh < 8;
  }
  CHECK(mixed);
}

}  // namespace
}  // namespace imgfuse::test
