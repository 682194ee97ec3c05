#include "control/protocol.h"

#include <doctest/doctest.h>

#include <string>

#include "support/random.h"

namespace imgfuse::control {
namespace {

TEST_CASE("control protocol: a request comes back from its line") {
  const Request request = {"snapshot-create", {{"name", "a \"b\"\n\u00e9"}}, 7};

  const std::string line = format_request(request);
  const auto parsed = parse_request(line);

  CHECK(line.find('\n') == line.size() - 1);
  REQUIRE(parsed);
  CHECK(parsed->command == "snapshot-create");
  CHECK(parsed->arguments == request.arguments);
  CHECK(parsed->id == 7);
}

TEST_CASE("control protocol: what is no request is refused in words") {
  for (const std::string line :
       {"", "x", "[]", "{", "null", "{}", "{\"command\": 5}", "{\"command\": \"\"}", "{\"command\": \"a\", \"b\": 1}",
        "{\"command\": \"a\", \"arguments\": []}", "{\"command\": \"a\"} {}", "\xff\xfe", "{\"command\": \"\xff\"}"}) {
    CAPTURE(line);
    const auto parsed = parse_request(line);
    REQUIRE(!parsed);
    CHECK(parsed.error().code() == ErrorCode::invalid);
    CHECK(!parsed.error().text().empty());
  }
}

TEST_CASE("control protocol: nesting does not reach the stack") {
  for (const char* key : {"id", "arguments", "command"}) {
    for (const char* pair : {"[]", "{}"}) {
      std::string line = std::string("{\"command\": \"hello\", \"") + key + "\": ";
      for (unsigned depth = 0; depth < 30000; ++depth) line += pair[0] == '[' ? "[" : "{\"a\":";
      const auto unfinished = parse_request(line);
      CHECK(!unfinished);
      if (pair[0] == '{') line += "1";
      line += std::string(30000, pair[1]) + "}";
      if (const auto parsed = parse_request(line)) CHECK(format_answer(Json(1), parsed->id).size() < 200);
    }
  }
}

TEST_CASE("control protocol: damaged lines are refused or read, whatever the damage") {
  const uint64_t seed = test::base_seed();
  CAPTURE(seed);
  test::Rng rng(seed);
  const std::string whole = format_request({"snapshot-create", {{"name", "a\"\u00e9"}, {"size", 1e300}}, {"x", 1}});
  unsigned read = 0;

  for (unsigned run = 0; run < 20'000; ++run) {
    std::string line = whole;
    for (uint64_t changes = rng.between(1, 4); changes > 0; --changes) {
      const size_t at = rng.below(line.size());
      if (rng.one_in(3))
        line.erase(at, rng.below(8));
      else if (rng.one_in(2))
        line.insert(at, line.substr(rng.below(line.size()), rng.below(20)));
      else
        line[at] = static_cast<char>(rng.below(256));
    }
    const auto request = parse_request(line);
    if (request) {
      CHECK(parse_request(format_request(*request)));
      ++read;
    }
  }

  CHECK(read > 0);
}

TEST_CASE("control protocol: answers and errors come back from their lines") {
  const auto good = parse_answer(format_answer(Json{{"a", 1}}, 3));
  REQUIRE(good);
  CHECK(good->at("a") == 1);
  for (const ErrorCode code : {ErrorCode::io, ErrorCode::busy, ErrorCode::not_found, ErrorCode::read_only}) {
    const auto bad = parse_answer(format_answer(fail(code, "why \xff not"), Json()));
    REQUIRE(!bad);
    CHECK(bad.error().code() == code);
    CHECK(bad.error().text().starts_with("why "));
  }
  for (const char* line : {"", "{}", "[]", "{\"error\": 1}", "{\"error\": {\"code\": 4}}", "nonsense"})
    CHECK(!parse_answer(line));
}

TEST_CASE("control protocol: the last line says how closing went") {
  const auto good = parse_closed(format_closed({}));
  REQUIRE(good);
  CHECK(*good);
  const auto bad = parse_closed(format_closed(fail(ErrorCode::io, "flush: disk on fire")));
  REQUIRE(bad);
  REQUIRE(!*bad);
  CHECK(bad->error().text() == "flush: disk on fire");
  CHECK(!parse_closed("{\"return\": 1}"));
  CHECK(!parse_closed("garbage"));
}

TEST_CASE("control protocol: each argument has its type, and unknown ones are refused") {
  const Json json = {{"name", "a"}, {"size", 5},      {"shrink", true},
                     {"empty", ""}, {"negative", -1}, {"zero", std::string("a\0b", 3)}};
  Arguments arguments(json);

  CHECK(arguments.text("name") == "a");
  CHECK(arguments.number("size") == 5u);
  CHECK(arguments.flag("shrink") == true);
  CHECK(arguments.flag("absent") == false);
  CHECK(arguments.number("absent", 9) == 9u);
  CHECK(!arguments.text("absent"));
  CHECK(!arguments.text("empty"));
  CHECK(!arguments.number("negative"));
  CHECK(arguments.text("zero").error().text() == "argument \"zero\" contains a zero byte");
  CHECK(arguments.finish());
  CHECK(Arguments(json).finish().error().text() == "there is no argument \"name\"");
  for (const char* name : {"size", "shrink"}) CHECK(!Arguments(json).text(name));
  for (const char* name : {"name", "shrink", "absent"}) CHECK(!Arguments(json).number(name));
  CHECK(!Arguments(json).flag("size"));
}

TEST_CASE("control protocol: a snapshot keeps what it has on its way") {
  const SnapshotInfo snapshot = {"3", "name", 4096, 1 << 20, 1'700'000'000, 5, 61'000'000'007, 12};

  Json json = to_json(snapshot);
  json["disk-size"] = snapshot.disk_size;
  const SnapshotInfo back = snapshot_from_json(json);

  CHECK(back.id == "3");
  CHECK(back.name == "name");
  CHECK(back.vm_state_size == 4096);
  CHECK(back.disk_size == 1 << 20);
  CHECK(back.date_sec == 1'700'000'000);
  CHECK(back.vm_clock_nsec == 61'000'000'007);
  CHECK(back.icount == 12u);
  CHECK(snapshot_from_json(Json::array()).id.empty());
}

}  // namespace
}  // namespace imgfuse::control
