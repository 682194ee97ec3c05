// Guest reads of compressed clusters.
#include <cstring>

#include "base/buffer.h"
#include "base/math.h"
#include "core/codec.h"
#include "format/qcow2/qcow2_disk.h"

namespace imgfuse::qcow2 {

/// Whole clusters are inflated where the caller wants them. Of others, which are read in small pieces, more than the
/// piece is kept.
Result<> Qcow2Disk::read_compressed(const Mapping& mapping, GuestOffset offset, Bytes out) {
  const uint64_t size = image_.geometry.cluster_size;
  const uint64_t within = offset.bytes() % size;
  const HostRange stream{mapping.compressed.offset, mapping.compressed.length};
  const auto inflate = [&](Bytes cluster) -> Result<> {
    Result<> done = read_stream(mapping.compressed, cluster);
    if (done) return done;
    return fail(done.error().during("compressed cluster at {:#x} for guest offset {:#x}", stream.begin.bytes(),
                                    offset.bytes() - within));
  };
  if (out.size() == size) {
    const ClusterCache::Content kept = image_.inflated.find(stream);
    if (!kept) return inflate(out);
    std::memcpy(out.data(), kept.get(), size);
    return {};
  }
  if (image_.inflated.keeps(size)) {
    IMG_LET(const ClusterCache::Content cluster, image_.inflated.get(stream, size, inflate));
    std::memcpy(out.data(), cluster.get() + within, out.size());
    return {};
  }
  thread_local Buffer scratch;
  scratch.reserve(size);
  const Bytes cluster = scratch.bytes().first(size);
  IMG_TRY(inflate(cluster));
  std::memcpy(out.data(), cluster.data() + within, out.size());
  return {};
}

/// Reads and inflates one stream to one cluster.
Result<> Qcow2Disk::read_stream(CompressedRange stream, Bytes cluster) {
  thread_local Buffer buffer;
  buffer.reserve(stream.length);
  const Bytes in = buffer.bytes().first(stream.length);
  IMG_TRY(storage_->read(stream.offset, in));
  return image_.geometry.compression == Compression::zstd ? codec::unzstd(in, cluster) : codec::inflate(in, cluster);
}

}  // namespace imgfuse::qcow2
