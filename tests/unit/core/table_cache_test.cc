#include "core/table_cache.h"

#include <doctest/doctest.h>

#include <memory>

#include "support/cold_storage.h"
#include "support/fault_storage.h"
#include "support/gate_storage.h"
#include "support/mem_storage.h"
#include "support/must.h"
#include "support/noted_fetches.h"

using namespace imgfuse;
using namespace imgfuse::test;

namespace {

constexpr size_t kTable = 512;
constexpr uint64_t kSmallest = 16;  // tables: the cache's lower limit

HostOffset table(uint64_t index) { return HostOffset(index * kTable); }

/// A storage whose table n is full of the byte n.
std::shared_ptr<MemStorage> numbered_tables(uint64_t count) {
  MemImage image;
  for (uint64_t i = 0; i < count; ++i) image.write(i * kTable, std::vector<std::byte>(kTable, std::byte(i)));
  return std::make_shared<MemStorage>(std::move(image));
}

std::byte first_byte(const TableCache::Pin& pin) { return pin.content()[0]; }

void set_first_byte(TableCache& cache, uint64_t index, std::byte value, unsigned stage = 0) {
  const auto pin = must(cache.pin(table(index)));
  cache.edit(pin, stage, 0, 1)[0] = value;
}

std::byte stored(MemStorage& storage, uint64_t index) {
  std::byte value;
  storage.image().read(index * kTable, {&value, 1});
  return value;
}

}  // namespace

TEST_CASE("TableCache: a table is read once while it stays") {
  auto storage = numbered_tables(4);
  TableCache cache(*storage, kTable, 0);

  CHECK(first_byte(must(cache.pin(table(3)))) == std::byte(3));
  CHECK(first_byte(must(cache.pin(table(3)))) == std::byte(3));

  CHECK(storage->counts().reads == 1);
}

TEST_CASE("TableCache: who does not want to wait has nobody wait in vain") {
  auto storage = numbered_tables(4);
  GateStorage gated(std::make_shared<ColdStorage>(storage));
  TableCache cache(gated, kTable, 0);
  NotedFetches fetches;
  const auto hurried = [&] {
    NoWait hurry(fetches, NoWait::Clock::now());
    const auto pin = cache.pin(table(2));
    return !pin && pin.error().code() == ErrorCode::would_wait && hurry.missed();
  };

  auto gate = gated.hold(Call::read);
  auto first = in_background(hurried);
  gate->wait_for_arrival();
  auto second = in_background([&] { return first_byte(must(cache.pin(table(2)))); });
  CHECK(waits(second));
  gate->open();
  CHECK(first.get());
  CHECK(second.get() == std::byte(2));  // which it loaded itself
  CHECK(storage->counts().reads == 1);
  CHECK(cache.statistics().loads == 1);

  cache.drop({HostOffset(0), 4 * kTable});
  gate = gated.hold(Call::read);
  auto loader = in_background([&] { return first_byte(must(cache.pin(table(2)))); });
  gate->wait_for_arrival();
  CHECK(hurried());  // at once, while another one loads it
  gate->open();
  CHECK(loader.get() == std::byte(2));
}

TEST_CASE("TableCache: two threads that miss the same table load it once and get the same one") {
  auto storage = numbered_tables(4);
  GateStorage gated(storage);
  TableCache cache(gated, kTable, 0);
  auto gate = gated.hold(Call::read);

  auto first = in_background([&] { return first_byte(must(cache.pin(table(2)))); });
  gate->wait_for_arrival();
  auto second = in_background([&] { return first_byte(must(cache.pin(table(2)))); });
  CHECK(waits(second));
  gate->open();

  CHECK(first.get() == std::byte(2));
  CHECK(second.get() == std::byte(2));
  CHECK(storage->counts().reads == 1);
}

TEST_CASE("TableCache: a load that fails fails for all who wait, and the next one tries again") {
  auto storage = numbered_tables(4);
  auto faulty = std::make_shared<FaultStorage>(storage);
  GateStorage gated(faulty);
  TableCache cache(gated, kTable, 0);
  auto gate = gated.hold(Call::read);
  faulty->fail_call(1, ErrorCode::io);

  auto first = in_background([&] { return cache.pin(table(1)).has_value(); });
  gate->wait_for_arrival();
  auto second = in_background([&] { return cache.pin(table(1)).has_value(); });
  CHECK(waits(second));
  gate->open();

  CHECK_FALSE(first.get());
  CHECK_FALSE(second.get());
  CHECK(first_byte(must(cache.pin(table(1)))) == std::byte(1));
  CHECK(cache.statistics().tables == 1);
}

TEST_CASE("TableCache: the least recently used clean table goes first") {
  auto storage = numbered_tables(kSmallest + 2);
  TableCache cache(*storage, kTable, 0);
  for (uint64_t i = 0; i < kSmallest; ++i) (void)must(cache.pin(table(i)));
  (void)must(cache.pin(table(0)));

  (void)must(cache.pin(table(kSmallest)));

  storage->counts().reset();
  (void)must(cache.pin(table(0)));
  CHECK(storage->counts().reads == 0);
  (void)must(cache.pin(table(1)));
  CHECK(storage->counts().reads == 1);
  CHECK(cache.statistics().tables == kSmallest);
}

TEST_CASE("TableCache: pinned tables stay, past the bound if need be, and the cache shrinks back") {
  auto storage = numbered_tables(3 * kSmallest);
  TableCache cache(*storage, kTable, 0);
  std::vector<TableCache::Pin> pins;
  for (uint64_t i = 0; i < 2 * kSmallest; ++i) pins.push_back(must(cache.pin(table(i))));

  CHECK(cache.statistics().tables == 2 * kSmallest);
  CHECK(first_byte(pins.front()) == std::byte(0));
  pins.clear();

  CHECK(cache.statistics().tables == kSmallest);
}

TEST_CASE("TableCache: eviction never writes; it asks for room when all is dirty") {
  auto storage = numbered_tables(kSmallest + 1);
  TableCache cache(*storage, kTable, 0);
  int asked = 0;
  cache.set_make_room([&] {
    ++asked;
    auto batch = cache.freeze(0);
    must(cache.write(batch));
    cache.thaw(batch, true);
  });
  for (uint64_t i = 0; i < kSmallest; ++i) set_first_byte(cache, i, std::byte(0xee));
  CHECK(storage->counts().writes == 0);

  (void)must(cache.pin(table(kSmallest)));

  CHECK(asked == 1);
  CHECK(stored(*storage, 0) == std::byte(0xee));
  CHECK(cache.statistics().tables == kSmallest);
}

TEST_CASE("TableCache: with no room to be had the bound is exceeded rather than a request refused") {
  auto storage = numbered_tables(kSmallest + 1);
  TableCache cache(*storage, kTable, 0);
  cache.set_make_room([] {});
  for (uint64_t i = 0; i < kSmallest; ++i) set_first_byte(cache, i, std::byte(0xee));

  CHECK(first_byte(must(cache.pin(table(kSmallest)))) == std::byte(kSmallest));
}

TEST_CASE("TableCache: what is edited during a cycle is written by the next one") {
  auto storage = numbered_tables(2);
  TableCache cache(*storage, kTable, 0);
  set_first_byte(cache, 0, std::byte(0xa0));
  auto batch = cache.freeze(0);
  set_first_byte(cache, 0, std::byte(0xa1));

  must(cache.write(batch));
  cache.thaw(batch, true);

  CHECK(stored(*storage, 0) == std::byte(0xa0));
  CHECK(first_byte(must(cache.pin(table(0)))) == std::byte(0xa1));
  batch = cache.freeze(0);
  REQUIRE(batch.size() == 1);
  must(cache.write(batch));
  cache.thaw(batch, true);
  CHECK(stored(*storage, 0) == std::byte(0xa1));
  CHECK(cache.statistics().dirty == 0);
}

TEST_CASE("TableCache: what could not be written is dirty again") {
  auto storage = numbered_tables(2);
  TableCache cache(*storage, kTable, 0);
  set_first_byte(cache, 1, std::byte(0xb0));

  cache.thaw(cache.freeze(0), false);

  CHECK(cache.statistics().dirty == 1);
  CHECK(cache.freeze(0).size() == 1);
}

TEST_CASE("TableCache: stages freeze apart, and neighbours are written together") {
  auto storage = numbered_tables(8);
  TableCache cache(*storage, kTable, 0);
  for (uint64_t i : {5, 3, 4}) set_first_byte(cache, i, std::byte(0xc0), 1);
  set_first_byte(cache, 6, std::byte(0xc1), 0);

  auto batch = cache.freeze(1);

  CHECK(batch.size() == 3);
  must(cache.write(batch));
  cache.thaw(batch, true);
  CHECK(storage->counts().writes == 1);
  CHECK(stored(*storage, 6) == std::byte(6));
  cache.thaw(cache.freeze(0), true);
}

TEST_CASE("TableCache: a dropped table is never written, and is read anew") {
  auto storage = numbered_tables(4);
  TableCache cache(*storage, kTable, 0);
  set_first_byte(cache, 2, std::byte(0xd0));
  const auto pinned = must(cache.pin(table(3)));

  cache.drop({table(2), 2 * kTable});

  CHECK(cache.statistics().dirty == 0);
  CHECK(cache.freeze(0).empty());
  CHECK(first_byte(must(cache.pin(table(2)))) == std::byte(2));
  CHECK(first_byte(pinned) == std::byte(3));  // lives on while pinned
}

TEST_CASE("TableCache: a table dropped while it is loaded is not found by the next one") {
  auto storage = numbered_tables(4);
  GateStorage gated(storage);
  TableCache cache(gated, kTable, 0);
  auto gate = gated.hold(Call::read, Point::after);
  auto stale = in_background([&] { return first_byte(must(cache.pin(table(2)))); });
  gate->wait_for_arrival();

  cache.drop({table(2), kTable});
  must(storage->write(table(2), std::vector<std::byte>(kTable, std::byte(0xff))));

  CHECK(first_byte(must(cache.pin(table(2)))) == std::byte(0xff));
  gate->open();
  CHECK(stale.get() == std::byte(2));
}
