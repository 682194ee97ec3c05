// Replacing the header: at every write of it, a crash leaves the old one or the new one.
#include "format/qcow2/header_update.h"

#include <doctest/doctest.h>

#include <set>

#include "bytes.h"
#include "qemu.h"
#include "support/builders.h"
#include "support/crash_storage.h"
#include "support/fault_storage.h"

namespace imgfuse::test {
namespace {

using qcow2::Header;
using qcow2::Purpose;

constexpr uint32_t kUnknownExtension = 0x12345678;

Header header_of(const MemImage& image) {
  MemStorage storage(image);
  return must(qcow2::read_header(storage, Purpose::write));
}

/// What the header says, wherever it lies.
std::vector<std::byte> meaning(const MemImage& image) { return must(qcow2::encode_header(header_of(image))); }

/// A variation of a header: with so many bytes of unknown extensions, a backing name, an unknown tail.
struct Variant {
  std::vector<size_t> extensions;
  size_t name = 0;
  size_t tail = 0;
  uint64_t seed = 0;
};

Header varied(Header header, const Variant& variant) {
  uint32_t type = kUnknownExtension;
  header.extensions.clear();
  for (const size_t length : variant.extensions)
    header.extensions.push_back({type++, pattern(length, variant.seed + type)});
  header.backing_name.reset();
  header.backing_format.reset();
  if (variant.name > 0) {
    header.backing_name = std::string(variant.name, static_cast<char>('a' + variant.seed % 26));
    header.backing_format = "raw";
  }
  header.unknown_tail = pattern(variant.tail, variant.seed);
  return header;
}

const Variant kVariants[] = {
    {.seed = 1},
    {.name = 20, .seed = 2},
    {.extensions = {24}, .name = 60, .seed = 3},
    {.extensions = {384}, .seed = 4},
    {.extensions = {384, 24}, .seed = 5},
    {.extensions = {24, 500}, .name = 30, .seed = 6},
    {.extensions = {700, 24}, .name = 200, .tail = 48, .seed = 7},
    {.extensions = {3}, .name = 1000, .seed = 8},
    {.extensions = {3000, 24, 900}, .name = 1023, .tail = 376, .seed = 9},
};

/// An image whose header is a variant, as a storage that crashes.
std::optional<MemImage> image_with(uint32_t cluster_size, uint32_t version, const Variant& variant) {
  MemImage image = make_qcow2({.size = 1_MiB, .cluster_size = cluster_size, .version = version});
  const auto bytes = qcow2::encode_header(varied(header_of(image), variant));
  if (!bytes) return std::nullopt;
  image.zero(0, cluster_size);
  image.write(0, *bytes);
  return image;
}

struct Outcome {
  bool replaced = false;
  size_t states = 0;
};

/// Replaces the header; at each moment some crashed images are looked at, and the replacement is repeated on them.
Outcome crash_everywhere(const MemImage& image, const Header& next, Rng& rng, int depth = 0) {
  const auto before = meaning(image);
  const auto after = must(qcow2::encode_header(next));
  CrashStorage storage(image);
  Outcome outcome;
  std::vector<MemImage> crashed;
  storage.set_observer([&] {
    for (const CrashMode mode : {CrashMode::none, CrashMode::all, CrashMode::torn, CrashMode::torn, CrashMode::torn})
      crashed.push_back(storage.crash(mode, rng));
  });
  const Result<> result = qcow2::replace_header(storage, next);
  outcome.replaced = result.has_value();
  if (!result) {
    CHECK(result.error().code() == ErrorCode::no_space);
    CHECK(crashed.empty());
    return outcome;
  }
  for (const MemImage& left : crashed) {
    ++outcome.states;
    const auto found = meaning(left);
    REQUIRE((found == before || found == after));
    if (depth == 0 && rng.one_in(4)) CHECK(crash_everywhere(left, next, rng, 1).replaced);
  }
  std::vector<std::byte> home(after.size());
  storage.image().read(0, home);
  CHECK(home == after);  // no padding is left
  return outcome;
}

}  // namespace

TEST_CASE("qcow2 header: replaced, a crash at any write leaves the old or the new one") {
  Rng rng(base_seed());
  INFO("IMG_SEED=" << base_seed());
  size_t states = 0;
  for (uint32_t cluster_size = 512; cluster_size <= 2_MiB; cluster_size *= cluster_size < 8192 ? 2 : 16)
    for (const uint32_t version : {2u, 3u})
      for (const Variant& from : kVariants)
        for (const Variant& to : kVariants) {
          if (version == 2 && (from.tail > 0 || to.tail > 0)) continue;
          if (cluster_size > 8192 && (from.seed + to.seed) % 4 != 0) continue;  // they take longer, to no end
          CAPTURE(cluster_size);
          CAPTURE(from.seed);
          CAPTURE(to.seed);
          const auto image = image_with(cluster_size, version, from);
          if (!image) continue;
          const Header next = varied(header_of(*image), to);
          if (!qcow2::encode_header(next)) continue;
          const Outcome outcome = crash_everywhere(*image, next, rng);
          states += outcome.states;
          if (cluster_size >= 16384) CHECK(outcome.replaced);  // twice the longest header fits
        }
  CHECK(states > 5000);
}

TEST_CASE("qcow2 header: what fits into the first sector is replaced with one write and one flush") {
  const auto image = image_with(4096, 3, {.name = 20, .seed = 1});
  MemStorage storage(*image);

  must(qcow2::replace_header(storage, varied(header_of(*image), {.extensions = {24}, .name = 60, .seed = 2})));

  CHECK(storage.counts().writes == 1);
  CHECK(storage.counts().flushes == 1);
}

TEST_CASE("qcow2 header: one that does not fit into its cluster changes nothing") {
  for (const uint32_t cluster_size : {512u, 1024u}) {
    const auto image = image_with(cluster_size, 3, {.extensions = {300}, .seed = 1});
    MemStorage storage(*image);

    const Result<> result = qcow2::replace_header(storage, varied(header_of(*image), {.extensions = {960}, .seed = 2}));

    REQUIRE_FALSE(result);
    CHECK(result.error().code() == ErrorCode::no_space);
    CHECK(storage.counts().writes == 0);
  }
}

TEST_CASE("qcow2 header: a name at the end of the cluster does not keep the header from being replaced") {
  MemImage image = make_qcow2({.size = 1_MiB, .cluster_size = 4096, .backing = "base.raw"});
  poke_text(image, 4088, "base.raw");
  poke<uint64_t>(image, 8, 4088);
  Rng rng(1);

  const Header next = varied(header_of(image), {.extensions = {500}, .name = 400, .seed = 2});

  CHECK(crash_everywhere(image, next, rng).replaced);
}

TEST_CASE("qcow2 header: lost bitmaps are forgotten with the next header, valid ones are kept") {
  MemImage image = make_qcow2({.size = 1_MiB});
  Header header = header_of(image);
  header.extensions.push_back({0x23852875, std::vector<std::byte>(24)});
  for (const uint64_t autoclear : {uint64_t{0}, qcow2::kBitmaps}) {
    header.autoclear = autoclear;
    MemStorage storage(image);

    must(qcow2::replace_header(storage, header));

    const Header now = header_of(storage.image());
    const bool there = now.extensions.back().type == 0x23852875;
    CHECK(there == (autoclear != 0));
  }
}

TEST_CASE("qcow2 header: every failing call leaves the old or the new one") {
  const auto image = image_with(65536, 3, {.extensions = {384, 24}, .name = 30, .seed = 1});
  const Header next = varied(header_of(*image), {.extensions = {384, 48}, .name = 90, .seed = 2});
  const std::set<std::vector<std::byte>> allowed = {meaning(*image), must(qcow2::encode_header(next))};
  for (uint64_t n = 1;; n += fault_step()) {
    CAPTURE(n);
    auto memory = std::make_shared<MemStorage>(*image);
    FaultStorage storage(memory);
    storage.fail_call(n, ErrorCode::io, {.torn = true});

    const Result<> result = qcow2::replace_header(storage, next);

    CHECK(allowed.contains(meaning(memory->image())));
    if (!storage.fired()) {
      CHECK(result);
      break;
    }
    CHECK_FALSE(result);
  }
}

TEST_CASE("qcow2 header: QEMU reads the header between its two switches") {
  if (!have_qemu()) return;
  const auto image = image_with(65536, 3, {.extensions = {384, 24}, .seed = 1});
  const Header next = varied(header_of(*image), {.extensions = {384, 48, 90}, .seed = 2});
  CrashStorage storage(*image);
  std::vector<MemImage> moments;
  storage.set_observer([&] { moments.push_back(storage.image()); });
  must(qcow2::replace_header(storage, next));
  for (const MemImage& moment : moments) {
    CHECK(qemu_check(moment).status == 0);
    (void)after_command(moment, "qemu-img info -f qcow2 {}");
  }
}

}  // namespace imgfuse::test
