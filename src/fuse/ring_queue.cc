#include "fuse/ring_queue.h"

#include <fmt/format.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/log.h"
#include "fuse/kernel_abi.h"
#include "fuse/ring_helpers.h"

namespace imgfuse::fuse {
namespace {

/// An answer of so many bytes is not kept back until those behind it are made. What is missing of it a helper reads.
constexpr uint32_t kLarge = 64 << 10;
/// Parts that are brought into memory for one request before a helper reads it.
constexpr unsigned kMaxFetches = 4;
/// Marks, beside the entry, that a part came for it.
constexpr uint64_t kFetched = 1;

}  // namespace

/// For one try of a READ.
class RingQueue::Fetcher final : public NoWait::Fetcher {
 public:
  Fetcher(RingQueue& queue, Entry& entry) : queue_(queue), entry_(entry) {}
  bool fetches() const { return fetches_; }
  void fetch(int file, uint64_t offset, size_t length) override {
    if (fetches_ || length >= kLarge || entry_.fetches == kMaxFetches) return;
    ++entry_.fetches;
    queue_.fetch(entry_, file, offset + length - 1);
    fetches_ = true;
  }

 private:
  RingQueue& queue_;
  Entry& entry_;
  bool fetches_ = false;
};

// ---- From other threads

Result<> RingQueue::make() {
  io_uring_params parameters = {};
  parameters.flags =
      IORING_SETUP_SQE128 | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_R_DISABLED;
  if (const int error = io_uring_queue_init_params(2 * kDepth, &ring_, &parameters); error < 0)
    return fail(ErrorCode::io, "io_uring: {}", strerror(-error));
  ring_made_ = true;
  wake_ = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake_) return fail(ErrorCode::io, "eventfd: {}", strerror(errno));
  for (Entry& entry : entries_) IMG_TRY(entry.make());
  return {};
}

RingQueue::~RingQueue() {
  stop();
  if (ring_made_) io_uring_queue_exit(&ring_);
}

void RingQueue::start(fuse_session* session, int fd, RingHelpers& helpers) {
  session_ = session;
  fd_ = fd;
  helpers_ = &helpers;
  thread_ = std::thread([this] { serve(); });
}

void RingQueue::stop() {
  ending_ = true;
  wake();
  if (thread_.joinable()) thread_.join();
}

void RingQueue::answered(RingEntry& entry, bool slow) {
  {
    Lock lock(mutex_);
    done_.push_back({&entry, slow});
  }
  wake();
}

void RingQueue::wake() {
  const uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof one);
}

// ---- The thread

void RingQueue::serve() {
  bind_to_cpu();
  ::pthread_setname_np(::pthread_self(), fmt::format("ring {}", number_).c_str());
  // Debian's liburing 2.3 has lost io_uring_enable_rings().
  if (::syscall(__NR_io_uring_register, ring_.ring_fd, IORING_REGISTER_ENABLE_RINGS, nullptr, 0) < 0)
    return log_warning("io_uring: the ring of CPU {} cannot be used", number_);
  for (Entry& entry : entries_) command(abi::kRegister, entry, 0);
  wait_for_wake();
  while (!left()) {
    const int submitted = io_uring_submit_and_wait(&ring_, 1);
    if (submitted < 0 && submitted != -EINTR && submitted != -EAGAIN && submitted != -EBUSY) break;
    std::array<io_uring_cqe*, 2 * kDepth> batch;
    const unsigned count = io_uring_peek_batch_cqe(&ring_, batch.data(), batch.size());
    std::array<std::pair<uint64_t, int>, 2 * kDepth> events;
    for (unsigned i = 0; i < count; ++i) events[i] = {batch[i]->user_data, batch[i]->res};
    io_uring_cq_advance(&ring_, count);
    for (unsigned i = 0; i < count; ++i) take(events[i].first, events[i].second);
  }
}

void RingQueue::bind_to_cpu() {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  CPU_SET(number_, &cpus);
  (void)::sched_setaffinity(0, sizeof cpus, &cpus);  // a CPU that is off or not ours: any will do
}

/// The connection has ended, or all is to end; nothing of ours is with a helper or waits for a disk.
bool RingQueue::left() const { return (ending_ || waiting_ == 0) && with_helpers_ == 0 && fetching_ == 0; }

void RingQueue::take(uint64_t user_data, int result) {
  if (user_data == 0) {
    uint64_t count;
    (void)!::read(wake_.get(), &count, sizeof count);
    commit_done();
    return wait_for_wake();
  }
  Entry& entry = static_cast<Entry&>(*reinterpret_cast<RingEntry*>(user_data & ~kFetched));
  if (user_data & kFetched) {
    --fetching_;
    return take_read(entry);  // whatever came of it: who reads sees
  }
  --waiting_;
  if (result < 0) {
    if (result != -ENOTCONN && result != -ECONNABORTED && result != -ECANCELED && !ending_)
      log_warning("FUSE over io_uring, CPU {}: {}", number_, strerror(-result));
    return;
  }
  if (disk_waits_.expects(entry)) return have_helped(entry);
  if (entry.opcode() == FUSE_READ) {
    entry.begun = NoWait::Clock::now();
    entry.fetches = 0;
    return take_read(entry);
  }
  const bool slow = disk_waits_.watch(entry, [&] { entry.answer(session_); });
  commit(entry, slow);
}

/// Reads what is in memory. What is not is fetched, and the request taken again when it has come; or a helper reads.
void RingQueue::take_read(Entry& entry) {
  Fetcher fetcher(*this, entry);
  NoWait hurry(fetcher, entry.begun);
  bool answered = false;
  const auto answer = [&] { answered = entry.try_answer(session_, hurry); };
  bool slow = false;
  if (disk_waits_.blind())
    slow = disk_waits_.watch(entry, answer);
  else
    answer();
  disk_waits_.note(hurry);
  if (answered) return commit(entry, slow);
  if (!fetcher.fetches()) have_helped(entry);
}

/// The host has begun to read the part when it found it missing; its last byte comes when all has come. Handed in at
/// once: the file may be closed soon, and its number be another file's.
void RingQueue::fetch(Entry& entry, int file, uint64_t last) {
  io_uring_sqe* const sqe = next_sqe();
  io_uring_prep_read(sqe, file, &fetched_, 1, last);
  sqe->user_data = reinterpret_cast<uint64_t>(static_cast<RingEntry*>(&entry)) | kFetched;
  ++fetching_;
  io_uring_submit(&ring_);
  if (io_uring_sq_ready(&ring_) > 0) sqe->opcode = IORING_OP_NOP;  // the kernel has no memory: later, then
}

void RingQueue::have_helped(Entry& entry) {
  ++with_helpers_;
  helpers_->add(*this, entry);
}

void RingQueue::commit(RingEntry& entry) { command(abi::kCommitAndFetch, entry, entry.commit_id()); }

/// Of a batch, the others of which may take as long if this one did.
void RingQueue::commit(RingEntry& entry, bool slow) {
  const bool large = entry.length() >= kLarge;
  commit(entry);
  if (slow || large) io_uring_submit(&ring_);
}

/// What helpers have answered.
void RingQueue::commit_done() {
  std::vector<Done> done;
  {
    Lock lock(mutex_);
    done.swap(done_);
  }
  for (const Done& one : done) {
    commit(*one.entry);
    disk_waits_.helper_was(one.slow);
  }
  with_helpers_ -= done.size();
}

// ---- The ring

void RingQueue::command(uint32_t operation, RingEntry& entry, uint64_t commit_id) {
  io_uring_sqe* const sqe = next_sqe();
  sqe->opcode = IORING_OP_URING_CMD;
  sqe->fd = fd_;
  sqe->cmd_op = operation;
  sqe->user_data = reinterpret_cast<uint64_t>(&entry);
  if (operation == abi::kRegister) {
    sqe->addr = reinterpret_cast<uint64_t>(entry.buffers().data());
    sqe->len = 2;
  }
  abi::Command what = {};
  what.commit_id = commit_id;
  what.queue = number_;
  std::memcpy(reinterpret_cast<std::byte*>(sqe) + 48, &what, sizeof what);
  ++waiting_;
}

void RingQueue::wait_for_wake() {
  io_uring_sqe* const sqe = next_sqe();
  io_uring_prep_poll_add(sqe, wake_.get(), POLLIN);
  sqe->user_data = 0;
}

/// A cleared one, twice as large as most rings have them.
io_uring_sqe* RingQueue::next_sqe() {
  io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
  while (sqe == nullptr) {
    io_uring_submit(&ring_);
    sqe = io_uring_get_sqe(&ring_);
  }
  std::memset(static_cast<void*>(sqe), 0, 2 * sizeof *sqe);
  return sqe;
}

}  // namespace imgfuse::fuse
