// Any bytes as a QED image: the header, info and check parsers, and repair.
#include <algorithm>
#include <array>

#include "byte_storage.h"
#include "format/qed/header.h"
#include "format/qed/qed.h"
#include "require.h"

using namespace imgfuse;
using fuzz::ByteStorage;
using fuzz::require;

namespace {

void fuzz_header(ConstBytes image) {
  ByteStorage storage(image);
  const auto header = qed::read_header(storage);
  if (!header) return;
  require(qed::write_header(storage, *header).has_value(), "the header fits into the storage");
  std::array<std::byte, qed::kHeaderBytes> written;
  require(storage.read(HostOffset(0), written) && std::ranges::equal(written, image.first(written.size())),
          "a rewritten header is the same");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const ConstBytes image(reinterpret_cast<const std::byte*>(data), size);
  fuzz_header(image);
  ByteStorage storage(image);
  (void)qed::info(storage);
  for (const Repair mode : {Repair::none, Repair::leaks, Repair::all})
    fuzz::require_honest_repair(image, mode, qed::check);
  return 0;
}
