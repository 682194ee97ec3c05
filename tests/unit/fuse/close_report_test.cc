#include "fuse/close_report.h"

#include <doctest/doctest.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

namespace imgfuse::fuse {
namespace {

const dev_t kDevice = makedev(0, 999999);

enum class Ending { closed, failed, killed };

/// Runs a daemon that ends that way once somebody waits for it, and returns what the waiting one learns.
Result<> wait_for(Ending ending) {
  int listening[2];
  int connected[2];
  REQUIRE((::pipe(listening) == 0 && ::pipe(connected) == 0));
  const pid_t daemon = ::fork();
  if (daemon == 0) {
    char byte = 0;
    auto reporter = CloseReporter::listen(kDevice);
    if (!reporter || ::write(listening[1], "", 1) != 1 || ::read(connected[0], &byte, 1) != 1) ::_exit(1);
    if (ending == Ending::closed) reporter->tell({});
    if (ending == Ending::failed) reporter->tell(fail(ErrorCode::io, "flush: disk on fire"));
    ::_exit(0);
  }
  char byte = 0;
  REQUIRE(::read(listening[0], &byte, 1) == 1);
  auto waiters = CloseWaiter::connect(kDevice, ::geteuid());
  REQUIRE(waiters.size() == 1);
  REQUIRE(::write(connected[1], "", 1) == 1);
  const Result<> result = waiters[0].wait();
  ::waitpid(daemon, nullptr, 0);
  for (const int fd : {listening[0], listening[1], connected[0], connected[1]}) ::close(fd);
  return result;
}

TEST_CASE("close report: who waits learns how closing went") {
  CHECK(wait_for(Ending::closed));
  const auto failed = wait_for(Ending::failed);
  REQUIRE(!failed);
  CHECK(failed.error().text() == "flush: disk on fire");
}

TEST_CASE("close report: a daemon that dies has not closed") {
  const auto killed = wait_for(Ending::killed);
  REQUIRE(!killed);
  CHECK(killed.error().text() == "the daemon ended before it had closed the image");
}

TEST_CASE("close report: there is nobody to wait for at other devices") {
  CHECK(CloseWaiter::connect(makedev(0, 999998), ::geteuid()).empty());
}

}  // namespace
}  // namespace imgfuse::fuse
