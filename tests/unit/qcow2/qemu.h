// QEMU's tools as an oracle, on temporary files.
#pragma once

#include <string>

#include "imgfuse/check.h"
#include "support/mem_storage.h"

namespace imgfuse::test {

/// Whether the tools are there. Where they are not, the tests that need them say so and pass.
bool have_qemu();

/// What `qemu-img check` says of an image.
struct QemuCheck {
  int status = -1;
  CheckReport report;  ///< without the fixed counts
  std::string errors;
};
QemuCheck qemu_check(const MemImage& image);

/// The image after a shell command in which {} stands for its file name. The command must succeed.
MemImage after_command(const MemImage& image, const std::string& command);

/// The image that a shell command makes in the file {}.
MemImage made_by(const std::string& command);

}  // namespace imgfuse::test
