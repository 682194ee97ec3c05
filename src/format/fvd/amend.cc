// Changes to the header of a closed image.
#include <algorithm>
#include <cstring>

#include "format/fvd/fvd.h"
#include "format/fvd/header.h"

namespace imgfuse::fvd {
namespace {

template <class Field, class Value>
void set(Field& field, const std::optional<Value>& value) {
  if (value) field = static_cast<std::remove_cvref_t<decltype(+field)>>(*value);
}

/// Writes the sectors that differ. Each is a step of its own, and good by itself.
Result<> replace(Storage& storage, const wire::Header& before, const wire::Header& after) {
  const ConstBytes was = std::as_bytes(std::span(&before, 1));
  const ConstBytes is = std::as_bytes(std::span(&after, 1));
  for (size_t at = 0; at < is.size(); at += kSector) {
    const size_t length = std::min<size_t>(kSector, is.size() - at);
    if (std::memcmp(was.data() + at, is.data() + at, length) != 0)
      IMG_TRY(storage.write(HostOffset(at), is.subspan(at, length)));
  }
  return storage.flush();
}

/// Another text in a fixed array. Within the first sector that it touches it changes at once or not at all.
template <size_t N>
Result<> set_text(char (&field)[N], size_t offset, const std::string& text, const char* name) {
  const size_t atomic = std::min(N, kSector - offset % kSector);
  if (std::max(text.size(), strnlen(field, N)) >= atomic)
    return fail(ErrorCode::unsupported, "a {} of {} bytes or more cannot be changed safely", name, atomic);
  if (text.find('\0') != std::string::npos) return fail(ErrorCode::invalid, "the {} has a NUL byte", name);
  std::memset(field, 0, N);
  std::copy(text.begin(), text.end(), field);
  return {};
}

}  // namespace

Result<> amend(Storage& storage, const AmendOptions& options) {
  if (options.compat || options.lazy_refcounts || options.data_file_raw)
    return fail(ErrorCode::invalid, "compat, lazy_refcounts and data_file_raw are options of qcow2");
  IMG_LET(const Header header, read_header(storage));
  const FvdSettings& s = options.fvd;
  if (s.prefetch_perf_calc_alpha.value_or(0) > 100)
    return fail(ErrorCode::invalid, "prefetch_perf_calc_alpha {} is more than 100 percent",
                *s.prefetch_perf_calc_alpha);
  if (s.clean_shutdown && *s.clean_shutdown && !header.clean_shutdown && header.journal_sectors() > 0)
    return fail(ErrorCode::invalid,
                "the journal holds changes that calling the image clean would lose; imgfuse check --repair leaks "
                "brings them in");
  wire::Header wire;
  IMG_TRY(storage.read(HostOffset(0), std::as_writable_bytes(std::span(&wire, 1))));
  const wire::Header before = wire;
  set(wire.copy_on_read, s.copy_on_read);
  set(wire.need_zero_init, s.need_zero_init);
  set(wire.clean_shutdown, s.clean_shutdown);
  set(wire.max_outstanding_copy_on_read, s.max_outstanding_copy_on_read_data);
  set(wire.prefetch_start_delay, s.prefetch_start_delay);
  set(wire.prefetch_slots, s.num_prefetch_slots);
  set(wire.bytes_per_prefetch, s.bytes_per_prefetch);
  set(wire.read_measure_time, s.prefetch_read_throughput_measure_time);
  set(wire.write_measure_time, s.prefetch_write_throughput_measure_time);
  set(wire.average_alpha, s.prefetch_perf_calc_alpha);
  set(wire.min_read_throughput, s.prefetch_min_read_throughput);
  set(wire.min_write_throughput, s.prefetch_min_write_throughput);
  set(wire.throttle_time, s.prefetch_throttle_time);
  if (options.backing_format && !header.uses_base())
    return fail(ErrorCode::invalid, "the image has no backing file whose format could be recorded");
  if ((s.data_file || s.data_file_format) && header.data_name.empty())
    return fail(ErrorCode::invalid, "the image's data lie in it, not in a data file");
  if (s.data_file && s.data_file->empty())
    return fail(ErrorCode::invalid, "the data file needs a name, as its data lie nowhere else");
  if (options.backing_format)
    IMG_TRY(set_text(wire.base_format, offsetof(wire::Header, base_format), *options.backing_format, "format"));
  if (s.data_file)
    IMG_TRY(set_text(wire.data_name, offsetof(wire::Header, data_name), *s.data_file, "data file's name"));
  if (s.data_file_format)
    IMG_TRY(set_text(wire.data_format, offsetof(wire::Header, data_format), *s.data_file_format, "format"));
  return replace(storage, before, wire);
}

Result<> change_backing(Storage& storage, const std::string& name, const std::optional<std::string>& format) {
  IMG_LET(const Header header, read_header(storage));
  if (header.all_data_in_image && name.empty()) return {};
  if (header.all_data_in_image)
    return fail(ErrorCode::unsupported, "everything is in the image, which has no bitmap for another backing file");
  if (name.empty())
    return fail(ErrorCode::unsupported,
                "parts of the disk are in the backing file alone; prefetch them, and the image leaves it by itself");
  if (!format)
    return fail(ErrorCode::invalid, "the format of backing file {:?} is not given; it is never guessed", name);
  wire::Header wire;
  IMG_TRY(storage.read(HostOffset(0), std::as_writable_bytes(std::span(&wire, 1))));
  const wire::Header before = wire;
  IMG_TRY(set_text(wire.base_name, offsetof(wire::Header, base_name), name, "backing file's name"));
  IMG_TRY(set_text(wire.base_format, offsetof(wire::Header, base_format), *format, "format"));
  return replace(storage, before, wire);
}

}  // namespace imgfuse::fvd
