#include "fuse/stop_signals.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>

#include <array>
#include <cerrno>
#include <cstdint>

namespace imgfuse::fuse {
namespace {

// The values add up when both are posted.
constexpr uint64_t kTrigger = 1;
constexpr uint64_t kEnd = uint64_t{1} << 32;

sigset_t stop_signals() {
  sigset_t set;
  sigemptyset(&set);
  for (const int number : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&set, number);
  return set;
}

}  // namespace

StopSignals::StopSignals(std::function<void()> on_stop) : on_stop_(std::move(on_stop)) {
  const sigset_t set = stop_signals();
  pthread_sigmask(SIG_BLOCK, &set, &old_mask_);
  signals_ = UniqueFd(::signalfd(-1, &set, SFD_CLOEXEC));
  events_ = UniqueFd(::eventfd(0, EFD_CLOEXEC));
  thread_ = std::thread([this] { wait(); });
}

StopSignals::~StopSignals() {
  post(kEnd);
  thread_.join();
  // What is still pending, the signal that was served included, would end the process now.
  const sigset_t set = stop_signals();
  const timespec no_wait = {};
  while (::sigtimedwait(&set, nullptr, &no_wait) > 0) continue;
  pthread_sigmask(SIG_SETMASK, &old_mask_, nullptr);
}

void StopSignals::trigger() { post(kTrigger); }

void StopSignals::post(uint64_t event) { (void)!::write(events_.get(), &event, sizeof event); }

void StopSignals::wait() {
  std::array<pollfd, 2> sources = {pollfd{signals_.get(), POLLIN, 0}, pollfd{events_.get(), POLLIN, 0}};
  while (::poll(sources.data(), sources.size(), -1) < 0 && errno == EINTR) continue;
  uint64_t events = 0;
  if (sources[1].revents != 0) (void)!::read(events_.get(), &events, sizeof events);
  if (events < kEnd) on_stop_();
}

}  // namespace imgfuse::fuse
