#include "control/server.h"

#include <doctest/doctest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <latch>

#include "control/client.h"

namespace imgfuse::control {
namespace {

using std::string_view_literals::operator""sv;

const dev_t kDevice = makedev(0, 999999);

/// Sockets lie in a folder of the test's own.
class Runtime {
 public:
  Runtime() {
    REQUIRE(::mkdtemp(name_) != nullptr);
    ::setenv("XDG_RUNTIME_DIR", name_, 1);
  }
  ~Runtime() {
    ::unsetenv("XDG_RUNTIME_DIR");
    std::filesystem::remove_all(name_);
  }
  std::string folder() const { return std::string(name_) + "/imgfuse"; }

 private:
  char name_[32] = "/tmp/imgfuse-test-XXXXXX";
};

std::unique_ptr<Server> listen() {
  auto server = Server::listen(kDevice);
  INFO((server ? "" : server.error().text()));
  REQUIRE(server);
  return std::move(*server);
}

Result<Json> echo(const Request& request) {
  if (request.command == "fail") return fail(ErrorCode::not_found, "nothing here");
  return Json{{"command", request.command}, {"arguments", request.arguments}};
}

/// A client that says anything.
class RawClient {
 public:
  explicit RawClient(const std::string& path) : socket_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.c_str(), path.size());
    REQUIRE(::connect(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
  }
  void send(std::string_view text) {
    while (!text.empty()) {
      const ssize_t sent = ::send(socket_.get(), text.data(), text.size(), MSG_NOSIGNAL);
      if (sent < 0) return;
      text.remove_prefix(static_cast<size_t>(sent));
    }
  }
  void hang_up() { ::shutdown(socket_.get(), SHUT_WR); }
  std::string receive_all() {
    std::string text;
    char piece[4096];
    for (ssize_t n = 0; (n = ::read(socket_.get(), piece, sizeof piece)) > 0;)
      text.append(piece, static_cast<size_t>(n));
    return text;
  }

 private:
  UniqueFd socket_;
};

Client connect() {
  auto clients = Client::connect(kDevice, ::geteuid());
  REQUIRE(clients.size() == 1);
  return std::move(clients[0]);
}

TEST_CASE("control server: a client is answered, and again") {
  const Runtime runtime;
  const auto server = listen();
  server->start(echo);
  Client client = connect();

  const auto answer = client.call("hello", {{"name", "x"}});
  const auto error = client.call("fail");
  const auto again = client.call("hello");

  REQUIRE(answer);
  CHECK(answer->at("arguments").at("name") == "x");
  REQUIRE(!error);
  CHECK(error.error().code() == ErrorCode::not_found);
  CHECK(error.error().text() == "nothing here");
  CHECK(again);
  CHECK(client.pid() == ::getpid());
}

TEST_CASE("control server: the socket is this user's alone, and goes with the server") {
  const Runtime runtime;
  auto server = listen();
  struct stat attributes;

  REQUIRE(::stat(server->path().c_str(), &attributes) == 0);
  CHECK((attributes.st_mode & 07777) == 0600);
  REQUIRE(::stat(runtime.folder().c_str(), &attributes) == 0);
  CHECK((attributes.st_mode & 07777) == 0700);
  const std::string path = server->path();
  server.reset();
  CHECK(!std::filesystem::exists(path));
  CHECK(Client::connect(kDevice, ::geteuid()).empty());
}

TEST_CASE("control server: a folder that others can write to is not used") {
  const Runtime runtime;
  std::filesystem::create_directory(runtime.folder());
  ::chmod(runtime.folder().c_str(), 0777);

  const auto server = listen();

  CHECK(!server->path().starts_with(runtime.folder()));
  CHECK(std::filesystem::is_empty(runtime.folder()));
  CHECK(Client::connect(kDevice, ::geteuid()).size() == 1);
}

TEST_CASE("control server: sockets of the killed are removed, those of the living are not") {
  const Runtime runtime;
  const auto first = listen();
  const pid_t killed = ::fork();
  if (killed == 0) {
    (void)Server::listen(kDevice)->release();
    ::_exit(0);
  }
  ::waitpid(killed, nullptr, 0);
  const std::string abandoned = runtime.folder() + "/0:999999-" + std::to_string(killed) + ".sock";
  REQUIRE(std::filesystem::exists(abandoned));

  const auto second = Server::listen(makedev(0, 999998));

  REQUIRE(second);
  CHECK(!std::filesystem::exists(abandoned));
  CHECK(std::filesystem::exists(first->path()));
}

TEST_CASE("control server: daemons of other users are not asked") {
  const Runtime runtime;
  const auto server = listen();

  CHECK(Client::connect(kDevice, ::geteuid()).size() == 1);
  if (::geteuid() != 0) CHECK(Client::connect(kDevice, ::geteuid() + 1).empty());
  CHECK(Client::connect(makedev(0, 999998), ::geteuid()).empty());
}

TEST_CASE("control server: garbage gets an error, and the others an answer") {
  const Runtime runtime;
  const auto server = listen();
  server->start(echo);
  RawClient garbage(server->path());
  RawClient half(server->path());
  RawClient endless(server->path());
  RawClient silent(server->path());

  garbage.send("\xff\x00\x01 garbage\n{}\n\n[1,2]\n{\"command\": \"hello\"}\n"sv);
  garbage.hang_up();
  half.send("{\"command\": \"hel");
  endless.send(std::string(200'000, 'x'));

  const std::string answers = garbage.receive_all();
  CHECK(std::count(answers.begin(), answers.end(), '\n') == 5);
  CHECK(answers.ends_with("{\"return\":{\"command\":\"hello\",\"arguments\":{}}}\n"));
  CHECK(endless.receive_all().find("a line of more than 65536 bytes") != std::string::npos);
  CHECK(connect().call("hello"));
  half.send("lo\"}\n");
  half.hang_up();
  CHECK(half.receive_all().starts_with("{\"return\""));
}

TEST_CASE("control server: who does not take an answer keeps nobody waiting") {
  const Runtime runtime;
  const auto server = listen();
  const std::string large(1 << 20, 'x');
  server->start(
      [&](const Request& request) -> Result<Json> { return request.command == "large" ? Json(large) : Json(1); });
  RawClient greedy(server->path());

  for (unsigned i = 0; i < 100; ++i) greedy.send("{\"command\": \"large\"}\n");

  CHECK(connect().call("small"));
  greedy.hang_up();
  CHECK(greedy.receive_all().size() == 100 * (large.size() + std::string("{\"return\":\"\"}\n").size()));
}

TEST_CASE("control server: more clients than it has room for wait until others go") {
  const Runtime runtime;
  const auto server = listen();
  server->start(echo);
  std::vector<std::unique_ptr<RawClient>> crowd;
  for (unsigned i = 0; i < 64; ++i) crowd.push_back(std::make_unique<RawClient>(server->path()));
  RawClient late(server->path());
  late.send("{\"command\": \"hello\"}\n");
  late.hang_up();

  crowd.clear();

  CHECK(late.receive_all().starts_with("{\"return\""));
}

TEST_CASE("control server: quiesce waits for the command that runs, and begins no other") {
  const Runtime runtime;
  const auto server = listen();
  std::latch running(1);
  std::latch may_end(1);
  std::atomic<int> commands = 0;
  server->start([&](const Request&) -> Result<Json> {
    ++commands;
    running.count_down();
    may_end.wait();
    return Json(1);
  });
  RawClient client(server->path());
  client.send("{\"command\": \"a\"}\n{\"command\": \"b\"}\n");
  running.wait();

  std::thread quiescing([&] { server->quiesce(); });
  may_end.count_down();
  quiescing.join();
  const int ended = commands;
  client.send("{\"command\": \"c\"}\n");
  server->quiesce();

  CHECK(ended >= 1);
  CHECK(commands == ended);
  server->tell_closed({});
  const std::string answers = client.receive_all();
  CHECK(std::count(answers.begin(), answers.end(), '\n') == ended + 1);
  CHECK(answers.ends_with("{\"event\":\"closed\"}\n"));
}

enum class Ending { closed, failed, killed };

/// Runs a daemon that ends that way once somebody waits for it, and returns what the waiting one learns.
Result<> wait_for(Ending ending) {
  int listening[2];
  int connected[2];
  REQUIRE((::pipe(listening) == 0 && ::pipe(connected) == 0));
  const pid_t daemon = ::fork();
  if (daemon == 0) {
    char byte = 0;
    const auto server = Server::listen(kDevice);
    if (!server || ::write(listening[1], "", 1) != 1 || ::read(connected[0], &byte, 1) != 1) ::_exit(1);
    if (ending == Ending::killed) ::_exit(0);
    (*server)->quiesce();
    (*server)->tell_closed(ending == Ending::closed ? Result<>() : fail(ErrorCode::io, "flush: disk on fire"));
    ::_exit(0);
  }
  char byte = 0;
  REQUIRE(::read(listening[0], &byte, 1) == 1);
  Client client = connect();
  REQUIRE(::write(connected[1], "", 1) == 1);
  const Result<> result = client.wait_closed();
  ::waitpid(daemon, nullptr, 0);
  for (const int fd : {listening[0], listening[1], connected[0], connected[1]}) ::close(fd);
  return result;
}

TEST_CASE("control server: who waits learns how closing went") {
  const Runtime runtime;
  CHECK(wait_for(Ending::closed));
  const auto failed = wait_for(Ending::failed);
  REQUIRE(!failed);
  CHECK(failed.error().text() == "flush: disk on fire");
}

TEST_CASE("control server: a daemon that dies has not closed") {
  const Runtime runtime;
  const auto killed = wait_for(Ending::killed);
  REQUIRE(!killed);
  CHECK(killed.error().text() == "the daemon ended before it had closed the image");
}

}  // namespace
}  // namespace imgfuse::control
