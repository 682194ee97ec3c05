#include "core/flusher.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "support/fault_storage.h"
#include "support/gate_storage.h"
#include "support/mem_storage.h"
#include "support/must.h"

using namespace imgfuse;
using namespace imgfuse::test;

namespace {

/// Writes down what it is asked for; its pending changes are two numbers.
class Recorder final : public Flusher::Client {
 public:
  explicit Recorder(Storage& storage) : storage_(storage) {}

  bool counts = false;
  bool pointers = false;
  std::string log;

 private:
  void cut() override { log += "cut "; }
  Result<bool> write_stage(unsigned stage) override {
    const bool wanted = stage == 0 ? counts : pointers;
    log += "stage" + std::to_string(stage) + " ";
    if (wanted) IMG_TRY(storage_.write(HostOffset(stage * 512), zeroes_of(512)));
    return wanted;
  }
  void end_cycle(bool durable) override { log += durable ? "durable" : "failed"; }

  static ConstBytes zeroes_of(size_t size) {
    static const std::vector<std::byte> zeros(4096);
    return ConstBytes(zeros).first(size);
  }

  Storage& storage_;
};

}  // namespace

TEST_CASE("Flusher: one barrier without pointers, two with them") {
  MemStorage storage;
  Recorder client(storage);
  Latch latch;
  Flusher flusher(storage, client, 2, latch);

  must(flusher.flush());
  CHECK(storage.counts().flushes == 1);
  CHECK(client.log == "cut stage0 stage1 durable");

  client.counts = client.pointers = true;
  must(flusher.flush());
  CHECK(storage.counts().flushes == 3);
}

TEST_CASE("Flusher: callers that arrive during a cycle share the next one") {
  auto storage = std::make_shared<MemStorage>();
  GateStorage gated(storage);
  Recorder client(gated);
  Latch latch;
  Flusher flusher(gated, client, 2, latch);
  auto gate = gated.hold(Call::flush);

  auto first = in_background([&] { return flusher.flush().has_value(); });
  gate->wait_for_arrival();
  std::vector<Background<bool>> others;
  for (int i = 0; i < 5; ++i) others.push_back(in_background([&] { return flusher.flush().has_value(); }));
  for (auto& other : others) CHECK(waits(other));
  gate->open();

  CHECK(first.get());
  for (auto& other : others) CHECK(other.get());
  CHECK(flusher.cycles() == 2);
}

TEST_CASE("Flusher: after a failed write or barrier every later flush fails with the first error") {
  for (uint64_t call = 1; call <= 4; ++call) {
    CAPTURE(call);
    FaultStorage storage(std::make_shared<MemStorage>());
    Recorder client(storage);
    client.counts = client.pointers = true;
    Latch latch;
    Flusher flusher(storage, client, 2, latch);
    storage.fail_call(call, ErrorCode::io);

    const auto failed = flusher.flush();
    REQUIRE_FALSE(failed);
    CHECK(client.log.ends_with("failed"));
    const auto later = flusher.flush();
    REQUIRE_FALSE(later);
    CHECK(later.error().text() == failed.error().text());
  }
}
