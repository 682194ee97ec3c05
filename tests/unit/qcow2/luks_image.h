// An image encrypted with LUKS that QEMU opens, always of the same bytes. qemu-img can make one only where it can
// measure the processor, which it cannot on a busy machine.
#pragma once

#include "bytes.h"

namespace imgfuse::test {

/// Appends a LUKS header to `image`, which has no data, no backing file, clusters of 64 KiB, and counts of 16 bits in
/// cluster 2. The passphrase is "x". The key material is left zero: the master key is whatever that makes, and only its
/// digest is stored.
inline void add_luks_header(MemImage& image) {
  constexpr uint64_t kCluster = 65536;
  constexpr uint32_t kSlots = 8, kSlotSectors = 128, kLength = (8 + kSlots * kSlotSectors) * 512, kIterations = 1000;
  const uint64_t at = (image.size() + kCluster - 1) / kCluster * kCluster;
  const uint64_t clusters = (kLength + kCluster - 1) / kCluster;
  for (uint64_t i = 0; i < clusters; ++i) poke<uint16_t>(image, 2 * kCluster + (at / kCluster + i) * 2, 1);
  poke<uint8_t>(image, at + clusters * kCluster - 1, 0);

  poke<uint32_t>(image, 32, 2);  // crypt_method
  poke<uint32_t>(image, 112, 0x0537be77);
  poke<uint32_t>(image, 116, 16);
  poke<uint64_t>(image, 120, at);
  poke<uint64_t>(image, 128, kLength);
  poke<uint64_t>(image, 136, 0);  // no further extension

  // LUKS1 on-disk format, section "partition header".
  constexpr uint8_t kDigest[] = {0x46, 0x9b, 0x78, 0x45, 0xaf, 0xe9, 0xd8, 0xc8, 0x08, 0x4c,
                                 0xec, 0x68, 0x39, 0x28, 0x14, 0x0f, 0xff, 0x25, 0xb0, 0xf5};
  poke_text(image, at, "LUKS\xba\xbe");
  poke<uint16_t>(image, at + 6, 1);
  poke_text(image, at + 8, "aes");
  poke_text(image, at + 40, "ecb-plain");
  poke_text(image, at + 72, "sha1");
  poke<uint32_t>(image, at + 104, kLength / 512);
  poke<uint32_t>(image, at + 108, 16);  // bytes of the master key
  image.write(at + 112, std::as_bytes(std::span(kDigest)));
  poke<uint32_t>(image, at + 164, kIterations);
  poke_text(image, at + 168, "00000000-0000-0000-0000-000000000000");
  for (uint32_t slot = 0; slot < kSlots; ++slot) {
    const uint64_t begin = at + 208 + slot * 48;
    poke<uint32_t>(image, begin, slot == 0 ? 0x00ac71f3 : 0x0000dead);
    poke<uint32_t>(image, begin + 4, slot == 0 ? kIterations : 0);
    poke<uint32_t>(image, begin + 40, 8 + slot * kSlotSectors);
    poke<uint32_t>(image, begin + 44, 4000);  // stripes
  }
}

}  // namespace imgfuse::test
