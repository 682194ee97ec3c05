#include "fuse/handshake.h"

#include <linux/fuse.h>

#include <cstring>

#include "fuse/kernel_abi.h"

namespace imgfuse::fuse {
namespace {

/// fuse_init_out up to flags2 has not changed since; this comes behind it.
constexpr size_t kStackDepthAt = offsetof(fuse_init_out, flags2) + sizeof(uint32_t);
/// Host files may not lie in a stacked file system, such as overlayfs.
constexpr uint32_t kStackDepth = 1;

}  // namespace

void Handshake::look_at(ConstBytes request) {
  fuse_in_header in;
  fuse_init_in init;
  if (looked_ || request.size() < sizeof in + sizeof init) return;
  looked_ = true;
  std::memcpy(&in, request.data(), sizeof in);
  std::memcpy(&init, request.data() + sizeof in, sizeof init);
  if (in.opcode != FUSE_INIT) return;
  waiting_ = true;
  if ((init.flags & abi::kInitExtended) == 0) return;
  const uint64_t offered = uint64_t{init.flags2} << 32;
  agreed_.rings = wanted_.rings && (offered & abi::kOverRing) != 0;
  agreed_.passthrough = wanted_.passthrough && (offered & abi::kPassthrough) != 0;
}

bool Handshake::complete(const iovec* parts, int count) {
  if (!waiting_) return false;
  waiting_ = false;
  fuse_init_out init;
  if (count != 2 || parts[1].iov_len < sizeof init) {  // an error, or an answer to a kernel of long ago
    agreed_ = {};
    return true;
  }
  if (!agreed_.rings && !agreed_.passthrough) return true;
  auto* const answer = static_cast<std::byte*>(parts[1].iov_base);
  std::memcpy(&init, answer, sizeof init);
  const uint64_t taken = (agreed_.rings ? abi::kOverRing : 0) | (agreed_.passthrough ? abi::kPassthrough : 0);
  init.flags |= static_cast<uint32_t>(abi::kInitExtended);
  init.flags2 |= static_cast<uint32_t>(taken >> 32);
  std::memcpy(answer, &init, sizeof init);
  if (agreed_.passthrough) std::memcpy(answer + kStackDepthAt, &kStackDepth, sizeof kStackDepth);
  return true;
}

}  // namespace imgfuse::fuse
