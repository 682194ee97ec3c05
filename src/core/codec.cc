#include "core/codec.h"

#include <libdeflate.h>
#define ZLIB_CONST  // input is const
#include <zlib.h>
#include <zstd.h>

#include <cstdlib>
#include <memory>

namespace imgfuse::codec {
namespace {

/// Streaming inflate, which stops when the output is full, whatever follows. Slower than libdeflate.
class StreamInflater {
 public:
  StreamInflater() {
    constexpr int kRawWithLargestWindow = -15;
    if (inflateInit2(&stream_, kRawWithLargestWindow) != Z_OK) std::abort();
  }
  ~StreamInflater() { inflateEnd(&stream_); }
  StreamInflater(const StreamInflater&) = delete;
  StreamInflater& operator=(const StreamInflater&) = delete;

  Result<> run(ConstBytes in, Bytes out) {
    inflateReset(&stream_);
    stream_.next_in = reinterpret_cast<const Bytef*>(in.data());
    stream_.avail_in = static_cast<uInt>(in.size());
    stream_.next_out = reinterpret_cast<Bytef*>(out.data());
    stream_.avail_out = static_cast<uInt>(out.size());
    const int status = ::inflate(&stream_, Z_SYNC_FLUSH);
    if (stream_.avail_out == 0) return {};
    const size_t made = out.size() - stream_.avail_out;
    if (status == Z_STREAM_END || status == Z_OK || status == Z_BUF_ERROR)
      return fail(ErrorCode::corrupt, "the deflate stream ends after {} of {} bytes", made, out.size());
    return fail(ErrorCode::corrupt, "the deflate stream is damaged after {} of {} bytes: {}", made, out.size(),
                stream_.msg ? stream_.msg : "no reason given");
  }

 private:
  z_stream stream_{};
};

/// libdeflate cannot take its place: its distances reach back 32 KiB.
class Deflater {
 public:
  Deflater() {
    constexpr int kLevel = 5;  // a tenth faster than zlib's own choice, 6, and a thousandth larger
    constexpr int kRawWithSmallWindow = -12;
    constexpr int kMostMemory = 9;
    if (deflateInit2(&stream_, kLevel, Z_DEFLATED, kRawWithSmallWindow, kMostMemory, Z_DEFAULT_STRATEGY) != Z_OK)
      std::abort();
  }
  ~Deflater() { deflateEnd(&stream_); }
  Deflater(const Deflater&) = delete;
  Deflater& operator=(const Deflater&) = delete;

  size_t run(ConstBytes in, Bytes out) {
    deflateReset(&stream_);
    stream_.next_in = reinterpret_cast<const Bytef*>(in.data());
    stream_.avail_in = static_cast<uInt>(in.size());
    stream_.next_out = reinterpret_cast<Bytef*>(out.data());
    stream_.avail_out = static_cast<uInt>(out.size());
    return ::deflate(&stream_, Z_FINISH) == Z_STREAM_END ? out.size() - stream_.avail_out : 0;
  }

 private:
  z_stream stream_{};
};

struct FreeDeflate {
  void operator()(libdeflate_decompressor* d) const { libdeflate_free_decompressor(d); }
  void operator()(libdeflate_compressor* c) const { libdeflate_free_compressor(c); }
};
struct FreeZstd {
  void operator()(ZSTD_DCtx* d) const { ZSTD_freeDCtx(d); }
  void operator()(ZSTD_CCtx* c) const { ZSTD_freeCCtx(c); }
};

}  // namespace

Result<> inflate(ConstBytes in, Bytes out) {
  thread_local const std::unique_ptr<libdeflate_decompressor, FreeDeflate> fast(libdeflate_alloc_decompressor());
  if (!fast) std::abort();
  size_t used = 0;
  size_t made = 0;
  const auto status =
      libdeflate_deflate_decompress_ex(fast.get(), in.data(), in.size(), out.data(), out.size(), &used, &made);
  if (status == LIBDEFLATE_SUCCESS && made == out.size()) return {};
  // The stream may still fill the output and then go on, or run into foreign bytes. libdeflate cannot tell.
  thread_local StreamInflater exact;
  return exact.run(in, out);
}

Result<> unzstd(ConstBytes in, Bytes out) {
  thread_local const std::unique_ptr<ZSTD_DCtx, FreeZstd> context(ZSTD_createDCtx());
  if (!context) std::abort();
  // Frame by frame with the whole output at hand: the decoder then needs no window memory, however large a window
  // the frame asks for.
  size_t made = 0;
  while (made < out.size()) {
    const size_t frame = ZSTD_findFrameCompressedSize(in.data(), in.size());
    if (ZSTD_isError(frame))
      return fail(ErrorCode::corrupt, "no complete zstd frame after {} of {} bytes: {}", made, out.size(),
                  ZSTD_getErrorName(frame));
    const size_t length = ZSTD_decompressDCtx(context.get(), out.data() + made, out.size() - made, in.data(), frame);
    if (ZSTD_isError(length))
      return fail(ErrorCode::corrupt, "the zstd frame after {} of {} bytes is damaged: {}", made, out.size(),
                  ZSTD_getErrorName(length));
    made += length;
    in = in.subspan(frame);
  }
  return {};
}

size_t deflate(ConstBytes in, Bytes out) {
  thread_local Deflater deflater;
  return deflater.run(in, out);
}

bool looks_incompressible(ConstBytes in) {
  constexpr size_t kPieces = 4;
  constexpr size_t kPiece = 4096;  // the window of deflate(): what repeats further away does not help it
  if (in.size() < 2 * kPieces * kPiece) return false;  // to try is as cheap
  thread_local const std::unique_ptr<libdeflate_compressor, FreeDeflate> fast(libdeflate_alloc_compressor(1));
  if (!fast) std::abort();
  constexpr size_t kWorthIt = kPiece - kPiece / 64;
  std::byte out[kWorthIt];
  for (size_t i = 0; i < kPieces; ++i) {
    const ConstBytes piece = in.subspan(i * (in.size() / kPieces), kPiece);
    if (libdeflate_deflate_compress(fast.get(), piece.data(), piece.size(), out, sizeof out) != 0) return false;
  }
  return true;
}

size_t zstd(ConstBytes in, Bytes out) {
  thread_local const std::unique_ptr<ZSTD_CCtx, FreeZstd> context(ZSTD_createCCtx());
  if (!context) std::abort();
  constexpr int kLevel = 3;  // the library's choice and QEMU's
  const size_t length = ZSTD_compressCCtx(context.get(), out.data(), out.size(), in.data(), in.size(), kLevel);
  return ZSTD_isError(length) ? 0 : length;
}

uint32_t crc32(ConstBytes in, uint32_t before) { return libdeflate_crc32(before, in.data(), in.size()); }

}  // namespace imgfuse::codec
