// Any bytes as a qcow2 image: the header, info and check parsers, and repair.
#include "byte_storage.h"
#include "format/qcow2/header.h"
#include "format/qcow2/qcow2.h"
#include "require.h"

using namespace imgfuse;
using fuzz::ByteStorage;
using fuzz::require;

namespace {

void fuzz_header(ConstBytes image) {
  for (const auto purpose :
       {qcow2::Purpose::info, qcow2::Purpose::read, qcow2::Purpose::write, qcow2::Purpose::repair}) {
    ByteStorage storage(image);
    const auto header = qcow2::read_header(storage, purpose);
    if (!header) continue;
    const auto encoded = qcow2::encode_header(*header);
    if (!encoded) continue;  // too long for the cluster in its canonical form
    require(storage.write(HostOffset(0), *encoded).has_value(), "the header fits into the storage");
    const auto again = qcow2::read_header(storage, purpose);
    require(again && qcow2::encode_header(*again) == *encoded, "a rewritten header says the same");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const ConstBytes image(reinterpret_cast<const std::byte*>(data), size);
  fuzz_header(image);
  ByteStorage storage(image);
  (void)qcow2::info(storage);
  for (const Repair mode : {Repair::none, Repair::leaks, Repair::all})
    fuzz::require_honest_repair(image, mode, qcow2::check);
  return 0;
}
