// Guest writes that become compressed clusters.
#include <algorithm>
#include <cstring>

#include "base/buffer.h"
#include "core/codec.h"
#include "core/pieces.h"
#include "format/qcow2/qcow2_disk.h"

namespace imgfuse::qcow2 {
namespace {

/// Guest bytes that are compressed before their lease is taken, and linked under it.
constexpr uint64_t kPiece = 1 << 20;

}  // namespace

/// A guest cluster as it will be stored.
struct Qcow2Disk::EncodedCluster {
  enum class Form { zero, plain, stream };
  Form form = Form::plain;
  ConstBytes data;    ///< as the guest gave it; shorter than a cluster at the cut end of the disk
  ConstBytes stream;  ///< (stream)
};

/// Compresses with no lock and no lease held, so on as many CPUs as there are requests. The streams lie one behind the
/// other in memory of the calling thread, and live until its next piece.
class Qcow2Disk::Encoder {
 public:
  Encoder(const Geometry& geometry, bool zeros_are_free) : geometry_(geometry), zeros_are_free_(zeros_are_free) {}

  std::vector<EncodedCluster> encode(ConstBytes data) const {
    thread_local Buffer streams;
    const uint64_t size = geometry_.cluster_size;
    streams.reserve(round_up(data.size(), size));
    std::vector<EncodedCluster> clusters;
    clusters.reserve(geometry_.clusters_for(data.size()));
    for (Bytes room = streams.bytes(); !data.empty(); data = data.subspan(clusters.back().data.size())) {
      clusters.push_back(encode_cluster(data.first(std::min<size_t>(size, data.size())), room));
      room = room.subspan(clusters.back().stream.size());
    }
    return clusters;
  }

 private:
  EncodedCluster encode_cluster(ConstBytes data, Bytes room) const {
    if (zeros_are_free_ && is_zero(data)) return {EncodedCluster::Form::zero, data, {}};
    const Bytes out = room.first(geometry_.cluster_size - 1);  // as long as a cluster is not worth it
    const ConstBytes whole = padded(data);
    const size_t length = compress(whole, out);
    if (length == 0) return {EncodedCluster::Form::plain, data, {}};
    return {EncodedCluster::Form::stream, data, out.first(length)};
  }

  /// 0: not worth it.
  size_t compress(ConstBytes whole, Bytes out) const {
    if (geometry_.compression == Compression::zstd) return codec::zstd(whole, out);
    return codec::looks_incompressible(whole) ? 0 : codec::deflate(whole, out);
  }

  ConstBytes padded(ConstBytes data) const {
    if (data.size() == geometry_.cluster_size) return data;
    thread_local Buffer cluster;
    cluster.reserve(geometry_.cluster_size);
    const Bytes whole = cluster.bytes().first(geometry_.cluster_size);
    std::memcpy(whole.data(), data.data(), data.size());
    std::memset(whole.data() + data.size(), 0, whole.size() - data.size());
    return whole;
  }

  const Geometry& geometry_;
  const bool zeros_are_free_;
};

/// Compresses the whole clusters of a request. What it covers of others goes the way of other writes.
Result<> Qcow2Disk::write_compressed(GuestOffset offset, ConstBytes data) {
  const Geometry& g = image_.geometry;
  GuestRange range{offset, data.size()};
  // The cluster that the end of the disk cuts counts as whole.
  if (range.end().bytes() == do_size()) range.length = round_out(range, g.cluster_size).end() - offset;
  const Pieces pieces = split(range, g.cluster_size);
  const ConstBytes head = data.first(std::min<size_t>(pieces.head.length, data.size()));
  const ConstBytes tail = data.last(pieces.tail.length);
  ConstBytes whole = data.subspan(head.size(), data.size() - head.size() - tail.size());

  if (!head.empty()) IMG_TRY(write_plain(offset, head));
  const Encoder encoder(g, g.has_zero_flag() || !backing_);
  for (GuestOffset at = pieces.whole.begin; !whole.empty();) {
    const ConstBytes piece = whole.first(std::min<size_t>(whole.size(), std::max(kPiece, g.cluster_size)));
    const std::vector<EncodedCluster> clusters = encoder.encode(piece);
    {
      const auto lease = ranges_.exclusive({at, clusters.size() << g.cluster_bits});
      bitmaps_.record({at, piece.size()});
      IMG_TRY(write_clusters(at, clusters));
    }
    IMG_TRY(relieve());
    at = at + piece.size();
    whole = whole.subspan(piece.size());
  }
  return tail.empty() ? Result<>{} : write_plain(pieces.tail.begin, tail);
}

/// Stores neighbouring clusters, those of one form together.
Result<> Qcow2Disk::write_clusters(GuestOffset offset, std::span<const EncodedCluster> clusters) {
  using Form = EncodedCluster::Form;
  while (!clusters.empty()) {
    const Form form = clusters.front().form;
    const auto end = std::find_if(clusters.begin(), clusters.end(),
                                  [&](const EncodedCluster& cluster) { return cluster.form != form; });
    const auto run = clusters.first(static_cast<size_t>(end - clusters.begin()));
    const ConstBytes data(run.front().data.data(), run.back().data.data() + run.back().data.size());
    const uint64_t length = run.size() << image_.geometry.cluster_bits;
    if (form == Form::zero) IMG_TRY(zero_subclusters({offset, length}, Zeroing::may_free));
    if (form == Form::plain) IMG_TRY(write_runs(offset, data));
    if (form == Form::stream) IMG_TRY(write_streams(offset, run));
    offset = offset + length;
    clusters = clusters.subspan(run.size());
  }
  return {};
}

/// A full device may have room when the quarantine is released.
Result<PackedReservation> Qcow2Disk::reserve_packed(std::span<const EncodedCluster> streams) {
  std::vector<uint64_t> lengths;
  lengths.reserve(streams.size());
  for (const EncodedCluster& cluster : streams) lengths.push_back(cluster.stream.size());
  Result<PackedReservation> packed = packer_.reserve(lengths);
  if (packed || packed.error().code() != ErrorCode::no_space || !allocator_.has_quarantine()) return packed;
  IMG_TRY(flusher_.flush());
  return packer_.reserve(lengths);
}

/// Streams that lie one behind the other on the host are written at once. Linked when all are written (I2).
Result<> Qcow2Disk::write_streams(GuestOffset guest, std::span<const EncodedCluster> streams) {
  const Geometry& g = image_.geometry;
  while (!streams.empty()) {
    IMG_LET(const TableCache::Pin slice, map_.writable_slice(guest));
    const uint64_t in_slice = (g.slice_coverage() - guest.bytes() % g.slice_coverage()) >> g.cluster_bits;
    const auto part = streams.first(std::min<size_t>(streams.size(), in_slice));
    IMG_LET(PackedReservation packed, reserve_packed(part));
    for (size_t first = 0, next = 0; first < part.size(); first = next) {
      HostOffset end = packed.streams()[first].offset;
      while (next < part.size() && packed.streams()[next].offset == end) end = end + packed.streams()[next++].length;
      const std::byte* const begin = part[first].stream.data();
      IMG_TRY(storage_->write(packed.streams()[first].offset, ConstBytes(begin, end - packed.streams()[first].offset)));
    }
    map_.link_compressed(slice, guest, packed.streams());
    packed.commit();
    guest = guest + (part.size() << g.cluster_bits);
    streams = streams.subspan(part.size());
  }
  return {};
}

}  // namespace imgfuse::qcow2
