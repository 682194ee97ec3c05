// Guest reads of compressed clusters.
#include <cstring>

#include "base/buffer.h"
#include "base/math.h"
#include "core/codec.h"
#include "format/qcow2/qcow2_disk.h"

namespace imgfuse::qcow2 {

/// All of one request, in order.
Result<> Qcow2Disk::read_compressed(std::span<const CompressedPiece> pieces) {
  const GuestOffset begin = pieces.front().offset;
  const GuestOffset end = pieces.back().offset + pieces.back().out.size();
  return inflaters_.run({begin, end - begin}, pieces.size(), [&](size_t i) { return read_piece(pieces[i]); });
}

/// Whole clusters are inflated where the caller wants them. Of others, which are read in small pieces, more than the
/// piece is kept.
Result<> Qcow2Disk::read_piece(const CompressedPiece& piece) {
  const uint64_t size = image_.geometry.cluster_size;
  const uint64_t within = piece.offset.bytes() % size;
  const HostRange stream{piece.stream.offset, piece.stream.length};
  const auto fill = [&](Bytes cluster) { return inflate(piece.stream, piece.offset - within, cluster); };
  if (piece.out.size() == size) {
    const ClusterCache::Content kept = image_.inflated.find(stream);
    if (!kept) return fill(piece.out);
    std::memcpy(piece.out.data(), kept.get(), size);
    return {};
  }
  if (image_.inflated.keeps(size)) {
    IMG_LET(const ClusterCache::Content cluster, image_.inflated.get(stream, size, fill));
    std::memcpy(piece.out.data(), cluster.get() + within, piece.out.size());
    return {};
  }
  thread_local Buffer scratch;
  scratch.reserve(size);
  const Bytes cluster = scratch.bytes().first(size);
  IMG_TRY(fill(cluster));
  std::memcpy(piece.out.data(), cluster.data() + within, piece.out.size());
  return {};
}

/// For a sequential reader that has not come so far. The lease keeps the stream as it is until the cache has it, as
/// that of a reader does. What is wrong with the cluster is told to who reads it.
void Qcow2Disk::inflate_ahead(GuestOffset guest) {
  const uint64_t size = image_.geometry.cluster_size;
  const auto lease = ranges_.shared({guest, size});
  if (guest.bytes() >= do_size()) return;
  const Result<Mapping> run = map_.lookup({guest, size});
  if (!run || run->kind != ClusterKind::compressed) return;
  (void)image_.inflated.get({run->compressed.offset, run->compressed.length}, size,
                            [&](Bytes cluster) { return inflate(run->compressed, guest, cluster); });
}

/// Reads and inflates one stream to the cluster at `guest`.
Result<> Qcow2Disk::inflate(CompressedRange stream, GuestOffset guest, Bytes cluster) {
  thread_local Buffer buffer;
  buffer.reserve(stream.length);
  const Bytes in = buffer.bytes().first(stream.length);
  Result<> done = storage_->read(stream.offset, in);
  if (done)
    done = image_.geometry.compression == Compression::zstd ? codec::unzstd(in, cluster) : codec::inflate(in, cluster);
  if (done) return done;
  return fail(
      done.error().during("compressed cluster at {:#x} for guest offset {:#x}", stream.offset.bytes(), guest.bytes()));
}

}  // namespace imgfuse::qcow2
