// Any bytes as an FVD image: header, table, bitmap and journal, opened for reading and writing, and repair.
#include <algorithm>
#include <vector>

#include "byte_storage.h"
#include "format/fvd/fvd.h"
#include "require.h"

using namespace imgfuse;
using fuzz::ByteStorage;
using fuzz::require;

namespace {

/// A base or data file of zeros, and what is written to it is forgotten.
class Nothing final : public Disk {
  DiskInfo do_info() const override { return {.name = "nothing", .format = "raw", .size = do_size()}; }
  uint64_t do_size() const override { return 100000; }
  Result<> do_read(GuestOffset, Bytes out) override {
    std::fill(out.begin(), out.end(), std::byte{0});
    return {};
  }
  Result<> do_write(GuestOffset, ConstBytes) override { return {}; }
  Result<> do_write_zeroes(GuestRange, Zeroing) override { return {}; }
  Result<> do_populate(GuestRange, Holes) override { return {}; }
  Result<std::vector<Extent>> do_map(GuestRange range, size_t) override {
    return std::vector<Extent>{{.range = range}};
  }
  Result<> do_flush() override { return {}; }
  Result<> do_resize(uint64_t, ResizeOptions) override { return {}; }
  Result<> do_close() override { return {}; }
  uint64_t do_allocated() const override { return 0; }
  Result<> do_count_allocated(const std::atomic<bool>&) override { return {}; }
};

void fuzz_disk(ConstBytes image, bool read_only) {
  fvd::OpenParameters parameters;
  parameters.read_only = read_only;
  parameters.open_backing = [](const std::string&, const std::optional<std::string>&) {
    return Result<std::unique_ptr<Disk>>(std::make_unique<Nothing>());
  };
  auto disk = fvd::open(std::make_shared<ByteStorage>(image), std::move(parameters));
  if (!disk) return;
  const uint64_t size = (*disk)->size();
  const uint64_t part = std::min<uint64_t>(size, 65536);
  std::vector<std::byte> bytes(part, std::byte{7});
  if (part > 0) {
    require((*disk)->read(GuestOffset(size - part), bytes).has_value(), "what was opened can be read");
    (void)(*disk)->map({GuestOffset(0), size});
    if (!read_only) {
      (void)(*disk)->write(GuestOffset(0), ConstBytes(bytes).first(std::min<uint64_t>(part, 1000)));
      (void)(*disk)->populate({GuestOffset(0), part});
      (void)(*disk)->flush();
    }
  }
  (void)(*disk)->close();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const ConstBytes image(reinterpret_cast<const std::byte*>(data), size);
  ByteStorage storage(image);
  (void)fvd::info(storage);
  for (const Repair mode : {Repair::none, Repair::leaks, Repair::all})
    fuzz::require_honest_repair(image, mode, fvd::check);
  fuzz_disk(image, true);
  fuzz_disk(image, false);
  return 0;
}
