#include "format/magic.h"

#include <algorithm>
#include <array>

namespace imgfuse {
namespace {

using namespace std::string_view_literals;

struct Magic {
  size_t offset;
  std::string_view bytes;
  std::string_view format;
};

constexpr std::array kMagics = {
    Magic{0, "QFI\xfb\0\0\0\1"sv, "qcow"},
    Magic{0, "QFI\xfb"sv, "qcow2"},
    Magic{0, "QED\0"sv, "qed"},
    Magic{0, "\xa9\xf5\x43\x51"sv, "fvd"},
    Magic{0, "FVD\0"sv, "fvd"},  // a later draft, which the driver refuses
    Magic{0, "KDMV"sv, "vmdk"},
    Magic{0, "COWD"sv, "vmdk"},
    Magic{0, "# Disk DescriptorFile"sv, "vmdk"},
    Magic{0, "vhdxfile"sv, "vhdx"},
    Magic{0, "conectix"sv, "vpc"},
    Magic{64, "\x7f\x10\xda\xbe"sv, "vdi"},
    Magic{0, "LUKS\xba\xbe"sv, "luks"},
    Magic{0, "WithoutFreeSpace"sv, "parallels"},
    Magic{0, "WithouFreSpacExt"sv, "parallels"},
    Magic{0, "Bochs Virtual HD Image"sv, "bochs"},
};

}  // namespace

std::optional<std::string_view> magic_format(ConstBytes first_bytes) {
  const std::string_view text(reinterpret_cast<const char*>(first_bytes.data()), first_bytes.size());
  for (const Magic& magic : kMagics)
    if (text.size() >= magic.offset && text.substr(magic.offset).starts_with(magic.bytes)) return magic.format;
  return std::nullopt;
}

}  // namespace imgfuse
