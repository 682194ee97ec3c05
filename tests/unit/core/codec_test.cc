#include "core/codec.h"

#include <doctest/doctest.h>
#include <zlib.h>
#include <zstd.h>

#include <thread>
#include <vector>

#include "support/must.h"
#include "support/random.h"

using namespace imgfuse;
using namespace imgfuse::test;

namespace {

using ByteVector = std::vector<std::byte>;

/// Half noise, half repetition: compresses to something between.
ByteVector sample(size_t length, uint64_t seed = 1) {
  ByteVector bytes = pattern(length, seed);
  for (size_t i = 0; i < length; ++i)
    if (i % 512 >= 200) bytes[i] = static_cast<std::byte>(i / 512);
  return bytes;
}

ByteVector deflated(const ByteVector& in, int window_bits, bool finish = true) {
  z_stream stream{};
  REQUIRE(deflateInit2(&stream, Z_DEFAULT_COMPRESSION, Z_DEFLATED, window_bits, 9, Z_DEFAULT_STRATEGY) == Z_OK);
  ByteVector out(in.size() * 2 + 1000);
  ByteVector input = in;
  stream.next_in = reinterpret_cast<Bytef*>(input.data());
  stream.avail_in = static_cast<uInt>(input.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  deflate(&stream, finish ? Z_FINISH : Z_SYNC_FLUSH);
  out.resize(out.size() - stream.avail_out);
  deflateEnd(&stream);
  return out;
}

ByteVector zstd_frame(ConstBytes in) {
  ByteVector out(ZSTD_compressBound(in.size()));
  const size_t n = ZSTD_compress(out.data(), out.size(), in.data(), in.size(), 3);
  REQUIRE_FALSE(ZSTD_isError(n));
  out.resize(n);
  return out;
}

void append(ByteVector& out, const ByteVector& more) { out.insert(out.end(), more.begin(), more.end()); }

}  // namespace

TEST_CASE("codec: inflate gives back what was deflated, with small and large windows") {
  for (const size_t length : {512u, 65536u, 2u << 20}) {
    for (const int window : {-9, -12, -15}) {
      CAPTURE(length);
      CAPTURE(window);
      const ByteVector content = sample(length);
      ByteVector out(length);
      must(codec::inflate(deflated(content, window), out));
      CHECK(out == content);
    }
  }
}

TEST_CASE("codec: inflate ignores what follows the stream") {
  const ByteVector content = sample(65536);
  ByteVector in = deflated(content, -12);
  append(in, pattern(511, 7));
  ByteVector out(content.size());

  must(codec::inflate(in, out));

  CHECK(out == content);
}

TEST_CASE("codec: inflate stops when the output is full, although the stream goes on") {
  const ByteVector content = sample(65536);
  ByteVector out(4096);

  must(codec::inflate(deflated(content, -12), out));

  CHECK(std::equal(out.begin(), out.end(), content.begin()));
}

TEST_CASE("codec: inflate accepts an unterminated stream that fills the output") {
  const ByteVector content = sample(65536);
  ByteVector in = deflated(content, -12, false);
  append(in, ByteVector(100, std::byte{0xff}));  // an invalid block
  ByteVector out(content.size());

  must(codec::inflate(in, out));

  CHECK(out == content);
}

TEST_CASE("codec: inflate refuses short and damaged streams") {
  const ByteVector content = sample(65536);
  const ByteVector whole = deflated(content, -12);
  ByteVector out(content.size());
  SUBCASE("cut off") {
    const auto result = codec::inflate(ConstBytes(whole).first(whole.size() / 2), out);
    REQUIRE_FALSE(result);
    CHECK(result.error().code() == ErrorCode::corrupt);
  }
  SUBCASE("ends too early") {
    ByteVector larger(content.size() + 1);
    const auto result = codec::inflate(whole, larger);
    REQUIRE_FALSE(result);
    CHECK(result.error().text() == "the deflate stream ends after 65536 of 65537 bytes");
  }
  SUBCASE("not deflate") {
    const auto result = codec::inflate(ByteVector(1000, std::byte{0xff}), out);
    REQUIRE_FALSE(result);
    CHECK(result.error().text().find("the deflate stream is damaged after 0 of 65536 bytes") == 0);
  }
  SUBCASE("empty") { CHECK_FALSE(codec::inflate({}, out)); }
  SUBCASE("and works again afterwards") {
    CHECK_FALSE(codec::inflate(ByteVector(1000, std::byte{0xff}), out));
    must(codec::inflate(whole, out));
    CHECK(out == content);
  }
}

TEST_CASE("codec: unzstd gives back what was compressed, in one frame or several") {
  const ByteVector content = sample(65536);
  ByteVector two = zstd_frame(ConstBytes(content).first(32768));
  append(two, zstd_frame(ConstBytes(content).subspan(32768)));
  for (ByteVector in : {zstd_frame(content), two}) {
    append(in, pattern(300, 5));  // foreign bytes
    ByteVector out(content.size());
    must(codec::unzstd(in, out));
    CHECK(out == content);
  }
}

TEST_CASE("codec: unzstd skips frames without content") {
  const ByteVector content = sample(4096);
  ByteVector in = zstd_frame({});
  append(in, {std::byte{0x50}, std::byte{0x2a}, std::byte{0x4d}, std::byte{0x18},  // skippable, 4 bytes long
              std::byte{4}, std::byte{0}, std::byte{0}, std::byte{0}, std::byte{1}, std::byte{2}, std::byte{3},
              std::byte{4}});
  append(in, zstd_frame(content));
  ByteVector out(content.size());

  must(codec::unzstd(in, out));

  CHECK(out == content);
}

TEST_CASE("codec: unzstd refuses frames that do not end with the output") {
  const ByteVector content = sample(65536);
  const ByteVector whole = zstd_frame(content);
  SUBCASE("too long") {
    ByteVector out(65535);
    CHECK_FALSE(codec::unzstd(whole, out));
  }
  SUBCASE("too short") {
    ByteVector out(65537);
    CHECK_FALSE(codec::unzstd(whole, out));
  }
  SUBCASE("cut off") {
    ByteVector out(65536);
    CHECK_FALSE(codec::unzstd(ConstBytes(whole).first(whole.size() - 1), out));
  }
  SUBCASE("damaged") {
    ByteVector damaged = whole;
    for (size_t i = 20; i < 60; ++i) damaged[i] ^= std::byte{0x5a};
    ByteVector out(65536);
    const auto result = codec::unzstd(damaged, out);
    if (result) CHECK(out != content);  // without a checksum other content may come out, but nothing worse
  }
  SUBCASE("nothing") {
    ByteVector out(65536);
    CHECK_FALSE(codec::unzstd({}, out));
  }
}

TEST_CASE("codec: a zstd frame that asks for a huge window needs no memory for it") {
  // Magic, descriptor without sizes, window descriptor for 2^41 bytes, one raw last block of 4 bytes.
  const ByteVector in = {std::byte{0x28}, std::byte{0xb5}, std::byte{0x2f}, std::byte{0xfd}, std::byte{0x00},
                         std::byte{0xf8}, std::byte{0x21}, std::byte{0x00}, std::byte{0x00}, std::byte{'a'},
                         std::byte{'b'},  std::byte{'c'},  std::byte{'d'}};
  ByteVector out(4);
  (void)codec::unzstd(in, out);  // refused or not, it must not take 2 TiB
}

TEST_CASE("codec: threads decompress at the same time") {
  std::vector<std::thread> threads;
  std::atomic<int> right = 0;
  for (unsigned t = 0; t < 4; ++t) {
    threads.emplace_back([&right, t] {
      const ByteVector content = sample(65536, t + 1);
      const ByteVector deflate_stream = deflated(content, -12);
      const ByteVector frame = zstd_frame(content);
      for (int i = 0; i < 20; ++i) {
        ByteVector out(content.size());
        if (codec::inflate(deflate_stream, out) && out == content) ++right;
        std::fill(out.begin(), out.end(), std::byte{0});
        if (codec::unzstd(frame, out) && out == content) ++right;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(right == 4 * 40);
}

TEST_CASE("codec: what was compressed here comes back, and what does not fit is not compressed") {
  for (const size_t length : {512u, 65536u, 2u << 20}) {
    CAPTURE(length);
    const ByteVector content = sample(length);
    ByteVector packed(length);
    ByteVector out(length);

    packed.resize(codec::deflate(content, packed));
    CHECK(packed.size() > 0);
    must(codec::inflate(packed, out));
    CHECK(out == content);

    packed.resize(length);
    packed.resize(codec::zstd(content, packed));
    CHECK(packed.size() > 0);
    out.assign(length, {});
    must(codec::unzstd(packed, out));
    CHECK(out == content);

    const ByteVector noise = pattern(length);
    packed.resize(length - 1);
    CHECK(codec::deflate(noise, packed) == 0);
    CHECK(codec::zstd(noise, packed) == 0);
  }
}

TEST_CASE("codec: one compressible piece in a cluster is enough to try it") {
  ByteVector content = pattern(65536);
  CHECK(codec::looks_incompressible(content));
  for (const size_t at : {size_t{0}, size_t{16384}, size_t{49152}}) {
    ByteVector mixed = content;
    std::fill_n(mixed.begin() + static_cast<ptrdiff_t>(at), 4096, std::byte{7});
    CHECK_FALSE(codec::looks_incompressible(mixed));
  }
  CHECK_FALSE(codec::looks_incompressible(sample(65536)));
  content.resize(4096);
  CHECK_FALSE(codec::looks_incompressible(content));  // too short to be worth a look
}

TEST_CASE("codec: deflate reaches back no further than QEMU's reader, 4 KiB") {
  ByteVector content = pattern(6000, 1);
  append(content, pattern(6000, 1));  // what a larger window would find
  ByteVector packed(content.size() * 2);
  packed.resize(codec::deflate(content, packed));
  z_stream stream{};
  REQUIRE(inflateInit2(&stream, -12) == Z_OK);
  ByteVector out(content.size());
  stream.next_in = reinterpret_cast<Bytef*>(packed.data());
  stream.avail_in = static_cast<uInt>(packed.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());

  CHECK(inflate(&stream, Z_FINISH) == Z_STREAM_END);

  CHECK(out == content);
  inflateEnd(&stream);
}
