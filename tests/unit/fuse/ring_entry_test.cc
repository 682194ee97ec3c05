// Requests over rings without a kernel: the test fills the entries, and reads what was answered in them.
#define FUSE_USE_VERSION 314
#include "fuse/ring_entry.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <linux/fuse.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include "support/noted_fetches.h"

namespace imgfuse::fuse {
namespace {

constexpr size_t kLargest = 1 << 20;

/// What the handlers did.
struct Seen {
  std::string written;
  bool answers = true;
  bool in_memory = true;
  std::byte* room = nullptr;
  size_t outside = 0;  ///< bytes that went the way of /dev/fuse
};

Seen& seen(void* userdata) { return *static_cast<Seen*>(userdata); }

void read(fuse_req_t request, fuse_ino_t, size_t length, off_t offset, fuse_file_info*) {
  if (!seen(fuse_req_userdata(request)).answers) {
    fuse_reply_none(request);
    return;
  }
  if (!seen(fuse_req_userdata(request)).in_memory) {
    (void)NoWait::current()->miss(7, static_cast<uint64_t>(offset), length);
    fuse_reply_err(request, EAGAIN);
    return;
  }
  const auto room = RingEntry::room(length);
  REQUIRE(room);
  seen(fuse_req_userdata(request)).room = room->data();
  std::memset(room->data(), 'a' + static_cast<int>(offset % 26), length);
  fuse_reply_buf(request, reinterpret_cast<char*>(room->data()), length);
}

void write(fuse_req_t request, fuse_ino_t, const char* data, size_t length, off_t, fuse_file_info*) {
  seen(fuse_req_userdata(request)).written.assign(data, length);
  fuse_reply_write(request, length);
}

/// A session that thinks it is mounted.
class FakeSession {
 public:
  FakeSession() {
    char name[] = "test";
    char* words[] = {name};
    fuse_args args = FUSE_ARGS_INIT(1, words);
    fuse_lowlevel_ops operations = {};
    operations.read = read;
    operations.write = write;
    session_ = fuse_session_new(&args, &operations, sizeof operations, &seen_);
    fuse_opt_free_args(&args);
    REQUIRE(session_ != nullptr);
    const fuse_custom_io io = {.writev = [](int, iovec* parts, int count, void* userdata) -> ssize_t {
                                 if (const auto taken = RingEntry::take_answer(parts, count)) return *taken;
                                 size_t length = 0;
                                 for (int i = 0; i < count; ++i) length += parts[i].iov_len;
                                 imgfuse::fuse::seen(userdata).outside += length;
                                 return static_cast<ssize_t>(length);
                               },
                               .read = [](int, void*, size_t, void*) -> ssize_t { return 0; },
                               .splice_receive = nullptr,
                               .splice_send = nullptr};
    REQUIRE(fuse_session_custom_io(session_, &io, ::open("/dev/null", O_RDWR | O_CLOEXEC)) == 0);
    greet();
  }
  ~FakeSession() { fuse_session_destroy(session_); }
  fuse_session* get() const { return session_; }
  Seen& seen() { return seen_; }

 private:
  /// INIT, which comes by /dev/fuse.
  void greet() {
    struct {
      fuse_in_header header = {};
      fuse_init_in body = {};
    } init;
    init.header.len = sizeof init;
    init.header.opcode = FUSE_INIT;
    init.header.unique = 1;
    init.body.major = FUSE_KERNEL_VERSION;
    init.body.minor = FUSE_KERNEL_MINOR_VERSION;
    init.body.flags = FUSE_MAX_PAGES;
    fuse_buf buffer = {};
    buffer.mem = &init;
    buffer.size = sizeof init;
    fuse_session_process_buf(session_, &buffer);
    REQUIRE(seen_.outside > 0);
    seen_.outside = 0;
  }

  Seen seen_;
  fuse_session* session_ = nullptr;
};

/// An entry as the kernel fills it.
class Filled {
 public:
  Filled() { REQUIRE(entry_.make()); }
  RingEntry& entry() { return entry_; }

  template <class Body>
  void request(uint32_t opcode, const Body& body, const std::string& payload = "") {
    fuse_in_header in = {};
    in.len = static_cast<uint32_t>(sizeof in + sizeof body + payload.size());
    in.opcode = opcode;
    in.unique = 77;
    in.nodeid = 1;
    std::memcpy(header().in_out, &in, sizeof in);
    std::memcpy(header().operation, &body, sizeof body);
    std::memcpy(entry_.buffers()[1].iov_base, payload.data(), payload.size());
    header().payload_size = static_cast<uint32_t>(payload.size());
    header().commit_id = 99;
  }
  void set_length(uint32_t length) { std::memcpy(header().in_out, &length, sizeof length); }
  void set_payload_size(uint32_t size) { header().payload_size = size; }

  fuse_out_header out() const {
    fuse_out_header out;
    std::memcpy(&out, header().in_out, sizeof out);
    return out;
  }
  std::string payload() const {
    return std::string(static_cast<const char*>(entry_.buffers()[1].iov_base), header().payload_size);
  }

 private:
  abi::EntryHeader& header() const { return *static_cast<abi::EntryHeader*>(entry_.buffers()[0].iov_base); }
  RingEntry entry_;
};

fuse_read_in read_of(uint64_t offset, uint32_t size) {
  fuse_read_in in = {};
  in.offset = offset;
  in.size = size;
  return in;
}

TEST_CASE("fuse ring entry: a read is answered in place") {
  FakeSession session;
  Filled filled;
  for (const size_t length : {size_t{1}, size_t{4096}, kLargest}) {
    CAPTURE(length);
    filled.request(FUSE_READ, read_of(2, static_cast<uint32_t>(length)));
    CHECK(filled.entry().opcode() == FUSE_READ);
    CHECK(filled.entry().length() == length);
    CHECK(filled.entry().commit_id() == 99);

    filled.entry().answer(session.get());

    CHECK(filled.out().error == 0);
    CHECK(filled.out().unique == 77);
    CHECK(filled.payload() == std::string(length, 'c'));
    CHECK(session.seen().room == filled.entry().buffers()[1].iov_base);  // nothing was copied
    CHECK(session.seen().outside == 0);
    CHECK(!RingEntry::room(1));  // outside a handler
  }
}

TEST_CASE("fuse ring entry: a read that would wait is as if it had not been asked") {
  FakeSession session;
  Filled filled;
  test::NotedFetches fetches;
  session.seen().in_memory = false;
  filled.request(FUSE_READ, read_of(2, 4096));
  for (int i = 0; i < 3; ++i) {
    NoWait hurry(fetches, NoWait::Clock::now());
    CHECK(!filled.entry().try_answer(session.get(), hurry));
    CHECK(filled.entry().opcode() == FUSE_READ);
    CHECK(filled.entry().length() == 4096);
    CHECK(filled.entry().commit_id() == 99);
    CHECK(filled.payload().empty());
  }
  CHECK(fetches.parts == std::vector<test::NotedFetches::Part>(3, {7, 2, 4096}));

  session.seen().in_memory = true;
  NoWait hurry(fetches, NoWait::Clock::now());
  CHECK(filled.entry().try_answer(session.get(), hurry));
  CHECK(filled.out().error == 0);
  CHECK(filled.out().unique == 77);
  CHECK(filled.payload() == std::string(4096, 'c'));
  CHECK(session.seen().outside == 0);
}

TEST_CASE("fuse ring entry: a write's data comes whole") {
  FakeSession session;
  Filled filled;
  for (const size_t length : {size_t{1}, size_t{4096}, kLargest}) {
    std::string data(length, 'x');
    data.back() = 'y';
    fuse_write_in in = {};
    in.size = static_cast<uint32_t>(length);
    filled.request(FUSE_WRITE, in, data);
    CHECK(filled.entry().length() == length);

    filled.entry().answer(session.get());

    CHECK(session.seen().written == data);
    fuse_write_out out;
    REQUIRE(filled.payload().size() == sizeof out);
    std::memcpy(&out, filled.payload().data(), sizeof out);
    CHECK(out.size == length);
  }
}

TEST_CASE("fuse ring entry: what nobody answers, and what makes no sense, gets an error") {
  FakeSession session;
  Filled filled;
  const auto answered = [&] {
    filled.entry().answer(session.get());
    CHECK(filled.payload().empty());
    CHECK(filled.out().len == sizeof(fuse_out_header));
    CHECK(filled.out().unique == 77);
    return filled.out().error;
  };
  filled.request(4321, read_of(0, 1));  // no such request
  CHECK(answered() == -ENOSYS);
  CHECK(filled.entry().length() == 0);

  session.seen().answers = false;
  filled.request(FUSE_READ, read_of(0, 1));
  CHECK(answered() == -EIO);
  session.seen().answers = true;

  for (const uint32_t length :
       {0u, uint32_t{sizeof(fuse_in_header)} - 1, uint32_t{sizeof(fuse_in_header)} + 129, ~0u}) {
    CAPTURE(length);
    filled.request(FUSE_READ, read_of(0, 1));
    filled.set_length(length);
    CHECK(answered() == -EIO);
  }
  for (const uint32_t size : {uint32_t{sizeof(fuse_read_in)} + 1, uint32_t{kLargest} + 1, ~0u}) {
    CAPTURE(size);
    filled.request(FUSE_READ, read_of(0, 1));
    filled.set_payload_size(size);
    CHECK(answered() == -EIO);
  }
}

TEST_CASE("fuse ring entry: notices to the kernel go by /dev/fuse") {
  fuse_out_header notice = {};
  notice.len = sizeof notice;
  const iovec part = {&notice, sizeof notice};
  CHECK(!RingEntry::take_answer(&part, 1));
}

}  // namespace
}  // namespace imgfuse::fuse
