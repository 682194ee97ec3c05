#include "samples.h"

#include "qemu.h"
#include "support/builders.h"

namespace imgfuse::test {

Sample::Sample() : image(make_qcow2({.size = 1_MiB})) {
  set_l1(kL2 | kCopiedBit);
  image.write(kL2 + kCluster - 1, std::array{std::byte{0}});
  set_l2(0, kData | kCopiedBit);
  set_l2(1, (kData + kCluster) | kCopiedBit);
  set_l2(3, (kData + 2 * kCluster) | kCopiedBit);
  for (uint64_t cluster = 4; cluster < 8; ++cluster) set_count(cluster, 1);
  image.write(kData, pattern(3 * kCluster));
}

SnapshotSample::SnapshotSample()
    : image(after_command(Sample().image,
                          "qemu-img snapshot -c one {} && qemu-img snapshot -c two {} && "
                          "qemu-io -f qcow2 -c 'write -P 9 0 65536' {}")) {}

}  // namespace imgfuse::test
