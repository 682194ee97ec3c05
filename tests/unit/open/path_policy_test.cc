#include "open/path_policy.h"

#include <fcntl.h>
#include <sys/stat.h>

#include "storage/host_file.h"
#include "support/must.h"
#include "support/random.h"
#include "unit/storage/host.h"

namespace imgfuse::test {
namespace {

namespace fs = std::filesystem;

/// images/vm.qcow2 may name what lies in images/; elsewhere/ lies beside it.
struct Tree {
  Tree() {
    fs::create_directories(dir / "images/sub");
    fs::create_directory(dir / "elsewhere");
    fs::create_directory(dir / "images2");
    for (const char* file : {"images/vm.qcow2", "images/base.raw", "images/sub/deep.raw", "elsewhere/secret.raw",
                             "images2/near.raw", "images/a:b.raw"})
      make_file(dir / file, 512);
  }
  PathPolicy policy(const std::vector<std::string>& allowed = {}) const {
    return must(PathPolicy::create(image(), allowed));
  }
  std::string image() const { return dir / "images/vm.qcow2"; }
  /// Whether the name leads to that file.
  bool opens(const PathPolicy& policy, const std::string& name, const std::string& file) const {
    auto fd = policy.open(name, image());
    if (!fd) return false;
    const UniqueFd expected(::open((dir / file).c_str(), O_PATH));
    return must(file_id(fd->get())) == must(file_id(expected.get()));
  }
  Error failure(const std::string& name, const std::vector<std::string>& allowed = {}) const {
    auto fd = policy(allowed).open(name, image());
    REQUIRE(!fd);
    return fd.error();
  }

  const TempDir dir;
};

}  // namespace

TEST_CASE("path policy: names are resolved against the naming image's directory") {
  CHECK(resolve_name("vm.qcow2", "base.raw") == "base.raw");
  CHECK(resolve_name("dir/vm.qcow2", "base.raw") == "dir/base.raw");
  CHECK(resolve_name("/dir/vm.qcow2", "../base.raw") == "/dir/../base.raw");
  CHECK(resolve_name("/vm.qcow2", "base.raw") == "/base.raw");
  CHECK(resolve_name("dir/vm.qcow2", "/abs/base.raw") == "/abs/base.raw");
  CHECK(resolve_name("dir/vm.qcow2", "nbd:host:10809") == "nbd:host:10809");
}

TEST_CASE("path policy: files in the image's directory tree are opened, however they are named") {
  const Tree tree;
  const PathPolicy policy = tree.policy();

  CHECK(tree.opens(policy, "base.raw", "images/base.raw"));
  CHECK(tree.opens(policy, "./sub/deep.raw", "images/sub/deep.raw"));
  CHECK(tree.opens(policy, "../images/base.raw", "images/base.raw"));
  CHECK(tree.opens(policy, tree.dir / "images/base.raw", "images/base.raw"));
  CHECK(tree.opens(policy, "./a:b.raw", "images/a:b.raw"));
  auto from_below = policy.open("../base.raw", tree.dir / "images/sub/mid.qcow2");
  CHECK(from_below);
}

TEST_CASE("path policy: files elsewhere are refused, and the refusal tells the option") {
  const Tree tree;
  const std::string elsewhere = tree.dir / "elsewhere";

  for (const std::string& name : {std::string("../elsewhere/secret.raw"), elsewhere + "/secret.raw",
                                  std::string("sub/../../elsewhere/secret.raw")}) {
    CAPTURE(name);
    const Error error = tree.failure(name);
    CHECK(error.code() == ErrorCode::denied);
    CHECK(error.text() ==
          elsewhere + "/secret.raw is outside the image's directory; to allow it, add --allow-path " + elsewhere);
    CHECK(tree.opens(tree.policy({elsewhere}), name, "elsewhere/secret.raw"));
    CHECK(tree.opens(tree.policy({"/"}), name, "elsewhere/secret.raw"));
  }
}

TEST_CASE("path policy: a directory whose name begins the same is another directory") {
  const Tree tree;
  CHECK(tree.failure("../images2/near.raw").code() == ErrorCode::denied);
}

TEST_CASE("path policy: links do not lead out, and may lead around inside") {
  const Tree tree;
  fs::create_symlink("../elsewhere/secret.raw", tree.dir / "images/link.raw");
  fs::create_symlink(tree.dir / "elsewhere", tree.dir / "images/linked");
  fs::create_symlink(tree.dir / "images/sub", tree.dir / "images/inner");
  fs::create_symlink("images", tree.dir / "alias");

  CHECK(tree.failure("link.raw").code() == ErrorCode::denied);
  CHECK(tree.failure("linked/secret.raw").code() == ErrorCode::denied);
  CHECK(tree.opens(tree.policy(), "inner/deep.raw", "images/sub/deep.raw"));

  // An image reached through a linked directory, and an allowed directory given as a link.
  const PathPolicy alias = must(PathPolicy::create(tree.dir / "alias/vm.qcow2", {}));
  CHECK(alias.open("base.raw", tree.dir / "alias/vm.qcow2"));
  CHECK(tree.opens(tree.policy({tree.dir / "images/linked"}), "link.raw", "elsewhere/secret.raw"));
}

TEST_CASE("path policy: a link to an image does not open the directory that it points from") {
  // images/trap -> elsewhere/… is refused; an allowed image reached by a link outside gives no right to the link's
  // place.
  const Tree tree;
  fs::create_symlink("../images/sub/deep.raw", tree.dir / "elsewhere/entry.qcow2");
  const PathPolicy policy = tree.policy();
  const std::string entry = tree.dir / "elsewhere/entry.qcow2";

  CHECK(policy.open(entry, tree.image()));
  auto next = policy.open("secret.raw", entry);
  REQUIRE(!next);
  CHECK(next.error().code() == ErrorCode::denied);
}

TEST_CASE("path policy: protocols are not paths") {
  const Tree tree;
  for (const char* name : {"json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}", "nbd:localhost:10809",
                           "file:base.raw", "ssh://host/base.raw", "fat:rw:/", "a:b.raw"}) {
    CAPTURE(name);
    CHECK(tree.failure(name).code() == ErrorCode::denied);
    CHECK(tree.failure(name).text().find("is a protocol, and only files are opened") != std::string::npos);
  }
}

TEST_CASE("path policy: what is no image file is not even opened") {
  const Tree tree;
  REQUIRE(mkfifo((tree.dir / "images/fifo").c_str(), 0600) == 0);

  CHECK(tree.failure("fifo").text() == "is neither a regular file nor a block device");
  CHECK(tree.failure("sub").text() == "is a directory, not an image");
  CHECK(tree.failure(".").text() == "is a directory, not an image");
  CHECK(tree.failure("/dev/null", {"/dev"}).text() == "is neither a regular file nor a block device");
  CHECK(tree.failure("/dev/null").code() == ErrorCode::denied);
  CHECK(tree.failure("none.raw").text() == "no such file");
  CHECK(tree.failure("").code() == ErrorCode::corrupt);
  CHECK(tree.failure(std::string("base.raw\0.png", 13)).code() == ErrorCode::corrupt);
}

TEST_CASE("path policy: links of /proc are followed to what they are") {
  const Tree tree;
  const UniqueFd secret(::open((tree.dir / "elsewhere/secret.raw").c_str(), O_RDONLY));
  const std::string link = fmt::format("/proc/self/fd/{}", secret.get());

  CHECK(tree.failure(link).code() == ErrorCode::denied);

  fs::remove(tree.dir / "elsewhere/secret.raw");
  CHECK(tree.failure(link, {"/"}).text() == "it cannot be told in which directory it lies");
}

TEST_CASE("path policy: an allowed directory that does not exist is an error") {
  const Tree tree;
  auto policy = PathPolicy::create(tree.image(), {tree.dir / "none"});
  REQUIRE(!policy);
  CHECK(policy.error().text() == "--allow-path " + (tree.dir / "none") + ": no such file");
}

TEST_CASE("path policy: names cannot write on the terminal") {
  CHECK(printable("base\x1b[2J\n.raw\x7f") == "base?[2J?.raw?");
}

TEST_CASE("path policy: a file is made where one may be opened, and nowhere else") {
  const Tree tree;
  const PathPolicy policy = tree.policy({tree.dir / "elsewhere"});

  CHECK(must(policy.make("new.raw", tree.image())));
  CHECK(fs::exists(tree.dir / "images/new.raw"));
  CHECK(must(policy.make(tree.dir / "elsewhere/new.raw", tree.image())));
  CHECK_FALSE(must(policy.make("base.raw", tree.image())));  // it is there
  CHECK_FALSE(must(policy.make("sub", tree.image())));
  fs::create_symlink(tree.dir / "images2/link.raw", tree.dir / "images/link.raw");
  CHECK_FALSE(must(policy.make("link.raw", tree.image())));  // a link, wherever it leads
  for (const std::string name : {"../images2/new.raw", "/tmp/imgfuse-never", "none/new.raw", "sub/", "", "nbd:new.raw"})
    CHECK_FALSE(policy.make(name, tree.image()));
  CHECK_FALSE(fs::exists(tree.dir / "images2/new.raw"));
  CHECK_FALSE(fs::exists(tree.dir / "images2/link.raw"));
}

}  // namespace imgfuse::test
