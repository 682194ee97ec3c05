#include "fuse/ring_transport.h"

#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <liburing.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <fstream>
#include <thread>

#include "base/log.h"
#include "base/mutex.h"
#include "base/unique_fd.h"
#include "fuse/kernel_abi.h"
#include "fuse/ring_entry.h"

namespace imgfuse::fuse {
namespace {

using Clock = std::chrono::steady_clock;

/// Requests of one CPU that are under way at once.
constexpr unsigned kDepth = 16;
/// What a mount without rings may need: images of a chain, control connections, threads' own /dev/fuse.
constexpr rlim_t kOtherFiles = 64;
/// An answer of so many bytes is not kept back until those behind it are made.
constexpr uint32_t kLarge = 64 << 10;

/// How it is told that an answer had to wait for a disk: it took long; and, for one more system call, that the thread
/// slept, rather than lost its CPU to another one.
enum class Watch { time, sleep };

/// How often the calling thread has given its CPU away since it waited for something.
long times_slept() {
  rusage usage = {};
  ::getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_nvcsw;
}

/// Answers it, and says whether that had to wait for a disk.
bool answer_watched(fuse_session* session, RingEntry& entry, Watch watch) {
  constexpr auto kLong = std::chrono::microseconds(300);
  const long slept = watch == Watch::sleep ? times_slept() : 0;
  const auto begun = Clock::now();
  const auto per_byte = std::chrono::nanoseconds(entry.length());
  entry.answer(session);
  if (Clock::now() - begun <= kLong + per_byte) return false;
  return watch == Watch::time || times_slept() != slept;
}

}  // namespace

// ---- Helpers

class RingTransport::Helpers {
 public:
  Helpers(unsigned count, fuse_session* session) {
    for (unsigned i = 0; i < count; ++i) threads_.emplace_back([this, session] { work(session); });
  }
  ~Helpers() {
    {
      Lock lock(mutex_);
      ending_ = true;
      changed_.notify_all();
    }
    for (std::thread& thread : threads_) thread.join();
  }
  void add(Queue& queue, RingEntry& entry) {
    Lock lock(mutex_);
    work_.push_back({&queue, &entry});
    changed_.notify_one();
  }

 private:
  struct Work {
    Queue* queue;
    RingEntry* entry;
  };
  void work(fuse_session* session);

  Mutex mutex_;
  ConditionVariable changed_;
  std::deque<Work> work_ GUARDED_BY(mutex_);
  bool ending_ GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

// ---- A queue

class RingTransport::Queue {
 public:
  explicit Queue(uint16_t number) : number_(number) {}
  ~Queue() {
    stop();
    if (ring_made_) io_uring_queue_exit(&ring_);
  }
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  Result<> make() {
    io_uring_params parameters = {};
    parameters.flags =
        IORING_SETUP_SQE128 | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_R_DISABLED;
    if (const int error = io_uring_queue_init_params(2 * kDepth, &ring_, &parameters); error < 0)
      return fail(ErrorCode::io, "io_uring: {}", strerror(-error));
    ring_made_ = true;
    wake_ = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!wake_) return fail(ErrorCode::io, "eventfd: {}", strerror(errno));
    for (RingEntry& entry : entries_) IMG_TRY(entry.make());
    return {};
  }

  void start(fuse_session* session, int fd, Helpers& helpers) {
    fd_ = fd;
    thread_ = std::thread([this, session, &helpers] { serve(session, helpers); });
  }
  void stop() {
    ending_ = true;
    wake();
    if (thread_.joinable()) thread_.join();
  }
  /// From a helper: the entry is answered, and took long or not.
  void answered(RingEntry& entry, bool slow) {
    {
      Lock lock(mutex_);
      done_.push_back({&entry, slow});
    }
    wake();
  }

 private:
  void wake() {
    const uint64_t one = 1;
    (void)!::write(wake_.get(), &one, sizeof one);
  }

  void bind_to_cpu() {
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(number_, &cpus);
    (void)::sched_setaffinity(0, sizeof cpus, &cpus);  // a CPU that is off or not ours: any will do
  }

  io_uring_sqe* next_sqe() {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    while (sqe == nullptr) {
      io_uring_submit(&ring_);
      sqe = io_uring_get_sqe(&ring_);
    }
    return sqe;
  }

  void command(uint32_t operation, RingEntry& entry, uint64_t commit_id) {
    io_uring_sqe* const sqe = next_sqe();
    std::memset(static_cast<void*>(sqe), 0, 2 * sizeof *sqe);
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

  void wait_for_wake() {
    io_uring_sqe* const sqe = next_sqe();
    std::memset(static_cast<void*>(sqe), 0, 2 * sizeof *sqe);
    io_uring_prep_poll_add(sqe, wake_.get(), POLLIN);
    sqe->user_data = 0;
  }

  void serve(fuse_session* session, Helpers& helpers) {
    bind_to_cpu();
    // Debian's liburing 2.3 has lost io_uring_enable_rings().
    if (::syscall(__NR_io_uring_register, ring_.ring_fd, IORING_REGISTER_ENABLE_RINGS, nullptr, 0) < 0)
      return log_warning("io_uring: the ring of CPU {} cannot be used", number_);
    for (RingEntry& entry : entries_) command(abi::kRegister, entry, 0);
    wait_for_wake();
    while (!left()) {
      const int submitted = io_uring_submit_and_wait(&ring_, 1);
      if (submitted < 0 && submitted != -EINTR && submitted != -EAGAIN && submitted != -EBUSY) break;
      std::array<io_uring_cqe*, 2 * kDepth> batch;
      const unsigned count = io_uring_peek_batch_cqe(&ring_, batch.data(), batch.size());
      std::array<std::pair<uint64_t, int>, 2 * kDepth> events;
      for (unsigned i = 0; i < count; ++i) events[i] = {batch[i]->user_data, batch[i]->res};
      io_uring_cq_advance(&ring_, count);
      for (unsigned i = 0; i < count; ++i) take(session, helpers, events[i].first, events[i].second);
    }
  }

  /// The connection has ended, or all is to end; nothing of ours is with a helper.
  bool left() const { return (ending_ || waiting_ == 0) && with_helpers_ == 0; }

  void take(fuse_session* session, Helpers& helpers, uint64_t user_data, int result) {
    if (user_data == 0) {
      uint64_t count;
      (void)!::read(wake_.get(), &count, sizeof count);
      commit_done();
      return wait_for_wake();
    }
    RingEntry& entry = *reinterpret_cast<RingEntry*>(user_data);
    --waiting_;
    if (result < 0) {
      if (result != -ENOTCONN && result != -ECONNABORTED && result != -ECANCELED && !ending_)
        log_warning("FUSE over io_uring, CPU {}: {}", number_, strerror(-result));
      return;
    }
    if (is_slow(entry)) {
      ++with_helpers_;
      return helpers.add(*this, entry);
    }
    const bool slow = answer_here(session, entry);
    const bool large = entry.length() >= kLarge;
    commit(entry);
    if (slow || large) io_uring_submit(&ring_);  // others of the batch may take as long
  }

  /// The first answer that takes long has those behind it watched; if one of them sleeps, helpers take over.
  bool answer_here(fuse_session* session, RingEntry& entry) {
    const Watch watch = watched_ > 0 ? Watch::sleep : Watch::time;
    if (watched_ > 0) --watched_;
    const bool slow = answer_watched(session, entry, watch);
    if (slow) watched_ = kDepth;
    if (slow && watch == Watch::sleep) slow_ = kDepth;
    return slow;
  }

  /// Whether the request waits for the image's disk: those that always do, and others for a while after one did.
  bool is_slow(const RingEntry& entry) {
    switch (entry.opcode()) {
      case FUSE_READ:
      case FUSE_WRITE:
        if (slow_ == 0) return false;
        --slow_;
        return true;
      case FUSE_FSYNC:
      case FUSE_FALLOCATE:
      case FUSE_SETATTR:
      case FUSE_LSEEK:
      case FUSE_OPEN:
      case FUSE_RELEASE:
        return true;
      default:
        return false;
    }
  }

  void commit(RingEntry& entry) { command(abi::kCommitAndFetch, entry, entry.commit_id()); }

  void commit_done() {
    std::vector<Done> done;
    {
      Lock lock(mutex_);
      done.swap(done_);
    }
    for (const Done& one : done) {
      commit(*one.entry);
      if (one.slow) slow_ = kDepth;
    }
    with_helpers_ -= done.size();
  }

  struct Done {
    RingEntry* entry;
    bool slow;
  };

  const uint16_t number_;
  io_uring ring_ = {};
  bool ring_made_ = false;
  UniqueFd wake_;
  int fd_ = -1;
  std::array<RingEntry, kDepth> entries_;
  std::thread thread_;
  std::atomic<bool> ending_ = false;
  // The thread's own:
  size_t waiting_ = 0;  // entries that the kernel has
  size_t with_helpers_ = 0;
  unsigned watched_ = 0;  // so many requests more are watched
  unsigned slow_ = 0;     // so many requests more go to helpers

  Mutex mutex_;
  std::vector<Done> done_ GUARDED_BY(mutex_);
};

void RingTransport::Helpers::work(fuse_session* session) {
  for (;;) {
    Work next;
    {
      Lock lock(mutex_);
      while (work_.empty() && !ending_) changed_.wait(lock);
      if (work_.empty()) return;
      next = work_.front();
      work_.pop_front();
    }
    const bool slow = answer_watched(session, *next.entry, Watch::sleep);
    next.queue->answered(*next.entry, slow);
  }
}

// ---- The transport

RingTransport::RingTransport() = default;
RingTransport::~RingTransport() { stop(); }

Result<std::unique_ptr<RingTransport>> RingTransport::make() {
  std::ifstream parameter("/sys/module/fuse/parameters/enable_uring");
  if (parameter.get() != 'Y') return fail(ErrorCode::unsupported, "/sys/module/fuse/parameters/enable_uring is not Y");
  const long cpus = ::sysconf(_SC_NPROCESSORS_CONF);  // the kernel has a queue for each that there may be
  rlimit files = {};
  ::getrlimit(RLIMIT_NOFILE, &files);
  const rlim_t needed = 2 * static_cast<rlim_t>(cpus) + kOtherFiles;
  if (files.rlim_cur < needed)
    return fail(ErrorCode::unsupported, "{} files may be open (ulimit -n), {} are needed", files.rlim_cur, needed);
  std::unique_ptr<RingTransport> transport(new RingTransport);
  for (long i = 0; i < cpus; ++i) {
    transport->queues_.push_back(std::make_unique<Queue>(static_cast<uint16_t>(i)));
    IMG_TRY(transport->queues_.back()->make());
  }
  return transport;
}

void RingTransport::start(fuse_session* session) {
  fd_ = UniqueFd(::fcntl(fuse_session_fd(session), F_DUPFD_CLOEXEC, 0));
  helpers_ = std::make_unique<Helpers>(kDepth, session);
  for (const std::unique_ptr<Queue>& queue : queues_) queue->start(session, fd_.get(), *helpers_);
}

void RingTransport::stop() {
  for (const std::unique_ptr<Queue>& queue : queues_) queue->stop();
  helpers_.reset();
  fd_.reset();
}

}  // namespace imgfuse::fuse
