#include "format/registry.h"

#include "support/mem_storage.h"
#include "support/must.h"

namespace imgfuse::test {
namespace {

using namespace std::string_view_literals;

Result<const Format*> probe(std::string_view head, size_t offset = 0) {
  MemStorage storage;
  must(storage.write(HostOffset(offset), std::as_bytes(std::span(head))));
  return probe_format(storage);
}

}  // namespace

TEST_CASE("registry: raw, qcow2, qed and fvd are found by name, others are told apart") {
  CHECK(must(format_by_name("raw"))->name == "raw");
  CHECK(must(format_by_name("qcow2"))->name == "qcow2");
  CHECK(must(format_by_name("qed"))->name == "qed");
  CHECK(must(format_by_name("fvd"))->name == "fvd");

  for (const char* name : {"vmdk", "vhdx", "vdi", "vpc", "luks", "qcow"}) {
    const auto format = format_by_name(name);
    REQUIRE(!format);
    CHECK(format.error().code() == ErrorCode::unsupported);
    CHECK(format.error().text() == fmt::format("format {} is not implemented; raw, qcow2, qed and fvd are", name));
  }
  const auto unknown = format_by_name("QCOW2");
  REQUIRE(!unknown);
  CHECK(unknown.error().code() == ErrorCode::invalid);
}

TEST_CASE("registry: the first bytes tell the format, and raw is what tells nothing") {
  CHECK(must(probe("QFI\xfb\0\0\0\2"sv))->name == "qcow2");
  CHECK(must(probe("QFI\xfb\0\0\0\3"sv))->name == "qcow2");
  CHECK(must(probe("QFI\xfb\0\0\0\x63"sv))->name == "qcow2");  // the driver says which version it is
  CHECK(must(probe("QED\0"sv))->name == "qed");
  CHECK(must(probe("\xa9\xf5\x43\x51\1\0\0\0"sv))->name == "fvd");
  CHECK(must(probe("FVD\0\0\0\0\1"sv))->name == "fvd");  // the driver says that it is another layout
  CHECK(must(probe(""sv))->name == "raw");
  CHECK(must(probe("QFI"sv))->name == "raw");
  CHECK(must(probe("QFI\xfb\0\0\0\3"sv, 1))->name == "raw");
}

TEST_CASE("registry: a file of another format is not presented as a raw disk") {
  struct Case {
    std::string_view name, head;
    size_t offset = 0;
  };
  for (const Case& foreign :
       {Case{"qcow", "QFI\xfb\0\0\0\1"sv}, Case{"vmdk", "KDMV"sv}, Case{"vmdk", "COWD"sv}, Case{"vhdx", "vhdxfile"sv},
        Case{"vpc", "conectix"sv}, Case{"luks", "LUKS\xba\xbe"sv}, Case{"vdi", "\x7f\x10\xda\xbe"sv, 64}}) {
    CAPTURE(std::string(foreign.name));
    const auto format = probe(foreign.head, foreign.offset);
    REQUIRE(!format);
    CHECK(format.error().code() == ErrorCode::unsupported);
    CHECK(format.error().text().find(fmt::format("a {} image", foreign.name)) != std::string::npos);
    CHECK(format.error().text().find("--format raw") != std::string::npos);
  }
}

}  // namespace imgfuse::test
