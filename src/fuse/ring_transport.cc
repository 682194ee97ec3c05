#include "fuse/ring_transport.h"

#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <sys/resource.h>
#include <unistd.h>

#include <fstream>

#include "fuse/ring_helpers.h"
#include "fuse/ring_queue.h"

namespace imgfuse::fuse {
namespace {

/// What a mount without rings may need: images of a chain, control connections, threads' own /dev/fuse.
constexpr rlim_t kOtherFiles = 64;

}  // namespace

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
    transport->queues_.push_back(std::make_unique<RingQueue>(static_cast<uint16_t>(i)));
    IMG_TRY(transport->queues_.back()->make());
  }
  return transport;
}

void RingTransport::start(fuse_session* session) {
  fd_ = UniqueFd(::fcntl(fuse_session_fd(session), F_DUPFD_CLOEXEC, 0));
  helpers_ = std::make_unique<RingHelpers>(session);
  for (const std::unique_ptr<RingQueue>& queue : queues_) queue->start(session, fd_.get(), *helpers_);
}

void RingTransport::stop() {
  for (const std::unique_ptr<RingQueue>& queue : queues_) queue->stop();
  helpers_.reset();
  fd_.reset();
}

}  // namespace imgfuse::fuse
