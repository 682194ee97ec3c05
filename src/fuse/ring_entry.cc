#include "fuse/ring_entry.h"

#include <fuse_lowlevel.h>
#include <linux/fuse.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <span>

namespace imgfuse::fuse {
namespace {

constexpr size_t kPage = 4096;

/// The largest payload: libfuse asks the kernel for 256 pages.
size_t payload_room() {
  static const size_t room = 256 * static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  return room;
}

size_t memory_size() { return 2 * kPage + payload_room(); }

/// What this thread's handlers answer.
thread_local RingEntry* current = nullptr;

}  // namespace

RingEntry::~RingEntry() {
  if (memory_ != nullptr) ::munmap(memory_, memory_size());
}

Result<> RingEntry::make() {
  void* const memory =
      ::mmap(nullptr, memory_size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return fail(ErrorCode::io, "memory for requests: {}", strerror(errno));
  memory_ = static_cast<std::byte*>(memory);
  buffers_ = {{{memory_, sizeof(abi::EntryHeader)}, {payload(), payload_room()}}};
  return {};
}

std::byte* RingEntry::payload() const { return memory_ + 2 * kPage; }

uint32_t RingEntry::opcode() const {
  fuse_in_header in;
  std::memcpy(&in, header().in_out, sizeof in);
  return in.opcode;
}

uint32_t RingEntry::length() const {
  const uint32_t operation = opcode();
  if (operation != FUSE_READ && operation != FUSE_WRITE) return 0;
  static_assert(offsetof(fuse_read_in, size) == offsetof(fuse_write_in, size));
  fuse_read_in what;
  std::memcpy(&what, header().operation, sizeof what);
  return what.size;
}

/// The request as it would have come by /dev/fuse. None if the numbers of its parts contradict each other.
std::optional<Bytes> RingEntry::assemble() {
  fuse_in_header in;
  std::memcpy(&in, header().in_out, sizeof in);
  const uint32_t rest = header().payload_size;
  if (in.len < sizeof in || rest > payload_room() || in.len - sizeof in < rest) return std::nullopt;
  const size_t operation = in.len - sizeof in - rest;
  if (operation > sizeof header().operation) return std::nullopt;
  std::byte* const begin = payload() - operation - sizeof in;
  std::memcpy(begin, &in, sizeof in);
  std::memcpy(begin + sizeof in, header().operation, operation);
  return Bytes(begin, in.len);
}

void RingEntry::answer(fuse_session* session) {
  fuse_in_header in;
  std::memcpy(&in, header().in_out, sizeof in);
  answered_ = false;
  if (const auto request = assemble()) {
    fuse_buf buffer = {};
    buffer.mem = request->data();
    buffer.size = request->size();
    current = this;
    fuse_session_process_buf(session, &buffer);
    current = nullptr;
  }
  if (answered_) return;
  const fuse_out_header out = {.len = sizeof out, .error = -EIO, .unique = in.unique};
  std::memcpy(header().in_out, &out, sizeof out);
  header().payload_size = 0;
}

bool RingEntry::try_answer(fuse_session* session, NoWait& hurry) {
  fuse_in_header in;
  std::memcpy(&in, header().in_out, sizeof in);
  const uint32_t payload_size = header().payload_size;
  answer(session);
  if (!hurry.missed()) return true;
  std::memcpy(header().in_out, &in, sizeof in);
  header().payload_size = payload_size;
  return false;
}

std::optional<Bytes> RingEntry::room(size_t length) {
  if (current == nullptr || length > payload_room()) return std::nullopt;
  return Bytes(current->payload(), length);
}

std::optional<ssize_t> RingEntry::take_answer(const iovec* parts, int count) {
  if (current == nullptr || count < 1 || parts[0].iov_len != sizeof(fuse_out_header)) return std::nullopt;
  fuse_out_header out;
  std::memcpy(&out, parts[0].iov_base, sizeof out);
  if (out.unique == 0) return std::nullopt;  // a notice to the kernel, which goes the other way
  size_t length = 0;
  for (const iovec& part : std::span(parts + 1, static_cast<size_t>(count - 1))) {
    if (part.iov_len > payload_room() - length) {
      errno = EIO;
      return -1;
    }
    std::byte* const to = current->payload() + length;
    if (to != part.iov_base) std::memmove(to, part.iov_base, part.iov_len);
    length += part.iov_len;
  }
  abi::EntryHeader& header = current->header();
  std::memcpy(header.in_out, &out, sizeof out);
  header.payload_size = static_cast<uint32_t>(length);
  current->answered_ = true;
  return static_cast<ssize_t>(sizeof out + length);
}

}  // namespace imgfuse::fuse
