#include "fuse/ring_transport.h"

#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <liburing.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
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

using Clock = NoWait::Clock;

/// Requests of one CPU that are under way at once.
constexpr unsigned kDepth = 24;
/// Threads for those of them that wait for a disk.
constexpr unsigned kHelpers = 16;
/// What a mount without rings may need: images of a chain, control connections, threads' own /dev/fuse.
constexpr rlim_t kOtherFiles = 64;
/// An answer of so many bytes is not kept back until those behind it are made. What is missing of it a helper reads.
constexpr uint32_t kLarge = 64 << 10;
/// So many reads are watched after one of a file whose host cannot tell what is in memory.
constexpr unsigned kManyReads = 1000;
/// Parts that are brought into memory for one request before a helper reads it.
constexpr unsigned kMaxFetches = 4;
/// Marks, beside the entry, that a part came for it.
constexpr uint64_t kFetched = 1;

/// How it is told that an answer had to wait for a disk: it took long; and, for one more system call, that the thread
/// slept, rather than lost its CPU to another one.
enum class Watch { time, sleep };

/// How often the calling thread has given its CPU away since it waited for something.
long times_slept() {
  rusage usage = {};
  ::getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_nvcsw;
}

/// Calls it to answer so many bytes, and says whether that had to wait for a disk.
template <class Answer>
bool watch_answer(Watch watch, uint32_t length, Answer answer) {
  constexpr auto kLong = std::chrono::microseconds(50);
  const long slept = watch == Watch::sleep ? times_slept() : 0;
  const auto begun = Clock::now();
  const auto per_byte = std::chrono::nanoseconds(length);
  answer();
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
    for (Entry& entry : entries_) IMG_TRY(entry.make());
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
  /// And what is known of a READ in it.
  struct Entry : RingEntry {
    Clock::time_point begun;
    unsigned fetches = 0;
  };
  class Fetcher;

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
      for (unsigned i = 0; i < count; ++i) take(session, helpers, events[i].first, events[i].second);
    }
  }

  /// The connection has ended, or all is to end; nothing of ours is with a helper or waits for a disk.
  bool left() const { return (ending_ || waiting_ == 0) && with_helpers_ == 0 && fetching_ == 0; }

  void take(fuse_session* session, Helpers& helpers, uint64_t user_data, int result) {
    if (user_data == 0) {
      uint64_t count;
      (void)!::read(wake_.get(), &count, sizeof count);
      commit_done();
      return wait_for_wake();
    }
    Entry& entry = static_cast<Entry&>(*reinterpret_cast<RingEntry*>(user_data & ~kFetched));
    if (user_data & kFetched) {
      --fetching_;
      return take_read(session, helpers, entry);  // whatever came of it: who reads sees
    }
    --waiting_;
    if (result < 0) {
      if (result != -ENOTCONN && result != -ECONNABORTED && result != -ECANCELED && !ending_)
        log_warning("FUSE over io_uring, CPU {}: {}", number_, strerror(-result));
      return;
    }
    if (is_slow(entry)) return have_helped(helpers, entry);
    if (entry.opcode() == FUSE_READ) {
      entry.begun = Clock::now();
      entry.fetches = 0;
      return take_read(session, helpers, entry);
    }
    const bool slow = watch_here(entry, [&] { entry.answer(session); });
    commit(entry, slow);
  }

  /// Reads what is in memory. What is not is fetched, and the request taken again when it has come; or a helper reads.
  void take_read(fuse_session* session, Helpers& helpers, Entry& entry) {
    Fetcher fetcher(*this, entry);
    NoWait hurry(fetcher, entry.begun);
    bool answered = false;
    const auto answer = [&] { answered = entry.try_answer(session, hurry); };
    bool slow = false;
    if (blind_ > 0)
      slow = watch_here(entry, answer);
    else
      answer();
    if (hurry.may_have_waited())
      blind_ = kManyReads;
    else if (blind_ > 0)
      --blind_;
    if (answered) return commit(entry, slow);
    if (!fetcher.fetches()) have_helped(helpers, entry);
  }

  class Fetcher final : public NoWait::Fetcher {
   public:
    Fetcher(Queue& queue, Entry& entry) : queue_(queue), entry_(entry) {}
    bool fetches() const { return fetches_; }
    void fetch(int file, uint64_t offset, size_t length) override {
      if (fetches_ || length >= kLarge || entry_.fetches == kMaxFetches) return;
      ++entry_.fetches;
      queue_.fetch(entry_, file, offset + length - 1);
      fetches_ = true;
    }

   private:
    Queue& queue_;
    Entry& entry_;
    bool fetches_ = false;
  };

  /// The host has begun to read the part when it found it missing; its last byte comes when all has come. Handed in at
  /// once: the file may be closed soon, and its number be another file's.
  void fetch(RingEntry& entry, int file, uint64_t last) {
    io_uring_sqe* const sqe = next_sqe();
    std::memset(static_cast<void*>(sqe), 0, 2 * sizeof *sqe);
    io_uring_prep_read(sqe, file, &fetched_, 1, last);
    sqe->user_data = reinterpret_cast<uint64_t>(&entry) | kFetched;
    ++fetching_;
    io_uring_submit(&ring_);
    if (io_uring_sq_ready(&ring_) > 0) sqe->opcode = IORING_OP_NOP;  // the kernel has no memory: later, then
  }

  void have_helped(Helpers& helpers, RingEntry& entry) {
    ++with_helpers_;
    helpers.add(*this, entry);
  }

  /// The first answer that takes long has those behind it watched; if one of them sleeps, helpers take over.
  template <class Answer>
  bool watch_here(const RingEntry& entry, Answer answer) {
    const Watch watch = watched_ > 0 ? Watch::sleep : Watch::time;
    if (watched_ > 0) --watched_;
    const bool slow = watch_answer(watch, entry.length(), answer);
    if (slow) watched_ = kDepth;
    if (slow && watch == Watch::sleep) slow_ = kDepth;
    return slow;
  }

  /// Whether the request waits for the image's disk: those that always do, and others for a while after one did.
  bool is_slow(const RingEntry& entry) {
    switch (entry.opcode()) {
      case FUSE_READ:
        if (blind_ == 0) return false;
        [[fallthrough]];
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
  /// Of a batch, the others of which may take as long if this one did.
  void commit(RingEntry& entry, bool slow) {
    const bool large = entry.length() >= kLarge;
    commit(entry);
    if (slow || large) io_uring_submit(&ring_);
  }

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
  std::array<Entry, kDepth> entries_;
  std::thread thread_;
  std::atomic<bool> ending_ = false;
  // The thread's own:
  size_t waiting_ = 0;  // entries that the kernel has
  size_t with_helpers_ = 0;
  size_t fetching_ = 0;     // entries for which a part is fetched
  std::byte fetched_ = {};  // what is read then, which nobody looks at
  unsigned blind_ = 0;      // so many reads more may wait without a word
  unsigned watched_ = 0;    // so many requests more are watched
  unsigned slow_ = 0;       // so many requests more go to helpers

  Mutex mutex_;
  std::vector<Done> done_ GUARDED_BY(mutex_);
};

void RingTransport::Helpers::work(fuse_session* session) {
  ::pthread_setname_np(::pthread_self(), "ring helper");
  for (;;) {
    Work next;
    {
      Lock lock(mutex_);
      while (work_.empty() && !ending_) changed_.wait(lock);
      if (work_.empty()) return;
      next = work_.front();
      work_.pop_front();
    }
    RingEntry& entry = *next.entry;
    const bool slow = watch_answer(Watch::sleep, entry.length(), [&] { entry.answer(session); });
    next.queue->answered(entry, slow);
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
  helpers_ = std::make_unique<Helpers>(kHelpers, session);
  for (const std::unique_ptr<Queue>& queue : queues_) queue->start(session, fd_.get(), *helpers_);
}

void RingTransport::stop() {
  for (const std::unique_ptr<Queue>& queue : queues_) queue->stop();
  helpers_.reset();
  fd_.reset();
}

}  // namespace imgfuse::fuse
