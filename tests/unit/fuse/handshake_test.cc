#include "fuse/handshake.h"

#include <doctest/doctest.h>
#include <linux/fuse.h>

#include <array>
#include <cstring>

#include "fuse/kernel_abi.h"

namespace imgfuse::fuse {
namespace {

constexpr uint64_t kAll = abi::kInitExtended | abi::kPassthrough | abi::kOverRing;

struct Init {
  fuse_in_header header = {};
  fuse_init_in body = {};
};

void offer(Handshake& handshake, uint64_t flags, uint32_t opcode = FUSE_INIT, size_t left_out = 0) {
  Init init;
  init.header.opcode = opcode;
  init.body.flags = static_cast<uint32_t>(flags);
  init.body.flags2 = static_cast<uint32_t>(flags >> 32);
  handshake.look_at(std::as_bytes(std::span(&init, 1)).first(sizeof init - left_out));
}

/// The flags of the answer and the depth that is named behind them.
struct Answer {
  uint64_t flags = 0;
  uint32_t depth = 0;
};

Answer answer(Handshake& handshake) {
  fuse_out_header header = {};
  fuse_init_out body = {};
  body.flags = FUSE_ASYNC_READ;
  const std::array parts = {iovec{&header, sizeof header}, iovec{&body, sizeof body}};
  CHECK(handshake.complete(parts.data(), parts.size()));
  Answer answer;
  answer.flags = (uint64_t{body.flags2} << 32 | body.flags) & ~uint64_t{FUSE_ASYNC_READ};
  std::memcpy(&answer.depth, reinterpret_cast<std::byte*>(&body) + 36, sizeof answer.depth);
  CHECK((body.flags & FUSE_ASYNC_READ) != 0);
  return answer;
}

TEST_CASE("fuse handshake: what is wanted and offered is agreed upon") {
  struct Case {
    Extras wanted;
    uint64_t offered, taken;
    uint32_t depth;
  };
  const Case cases[] = {
      {{true, true}, kAll, kAll, 1},
      {{true, false}, kAll, abi::kInitExtended | abi::kOverRing, 0},
      {{false, true}, kAll, abi::kInitExtended | abi::kPassthrough, 1},
      {{false, false}, kAll, 0, 0},
      {{true, true}, abi::kInitExtended, 0, 0},
      {{true, true}, kAll & ~abi::kInitExtended, 0, 0},  // then flags2 means nothing
      {{true, true}, abi::kInitExtended | abi::kOverRing, abi::kInitExtended | abi::kOverRing, 0},
  };
  for (const Case& c : cases) {
    CAPTURE(c.offered);
    Handshake handshake;
    handshake.want(c.wanted);
    offer(handshake, c.offered);
    const Answer got = answer(handshake);
    CHECK(got.flags == c.taken);
    CHECK(got.depth == c.depth);
    CHECK(handshake.agreed().rings == ((c.taken & abi::kOverRing) != 0));
    CHECK(handshake.agreed().passthrough == ((c.taken & abi::kPassthrough) != 0));
  }
}

TEST_CASE("fuse handshake: only INIT counts, and only its own answer") {
  Handshake handshake;
  handshake.want({true, true});
  fuse_out_header header = {};
  const iovec error = {&header, sizeof header};
  CHECK(!handshake.complete(&error, 1));  // before any request
  offer(handshake, kAll);
  CHECK(answer(handshake).flags == kAll);
  CHECK(!handshake.complete(&error, 1));  // a later answer
  offer(handshake, 0);                    // bytes of a later request
  CHECK(handshake.agreed().rings);

  Handshake other;
  other.want({true, true});
  offer(other, kAll, FUSE_LOOKUP);
  CHECK(!other.complete(&error, 1));
}

TEST_CASE("fuse handshake: an old kernel's INIT and an error as its answer agree on nothing") {
  Handshake old;
  old.want({true, true});
  offer(old, kAll, FUSE_INIT, 48);  // as before flags2 came
  CHECK(!old.agreed().rings);

  Handshake refused;
  refused.want({true, true});
  offer(refused, kAll);
  fuse_out_header header = {};
  const iovec error = {&header, sizeof header};
  CHECK(refused.complete(&error, 1));
  CHECK(!refused.agreed().rings);
  CHECK(!refused.agreed().passthrough);
}

}  // namespace
}  // namespace imgfuse::fuse
